"""`python -m lungopacity.cli`."""

import sys

from lungopacity.cli import main

if __name__ == "__main__":
    sys.exit(main())
