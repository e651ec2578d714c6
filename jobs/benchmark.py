"""Ray job: how fast the parts are here. See `lungopacity benchmark --help`."""

import sys

from lungopacity.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
