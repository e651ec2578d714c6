"""`python -m lungopacity`: every command as a Ray job, where nothing is installed."""

import sys

from lungopacity.cli import main

if __name__ == "__main__":
    sys.exit(main())
