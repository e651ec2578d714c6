"""Ray job entry point: `ray job submit --working-dir . -- python jobs/nightly.py …`, options as in
`lungopacity nightly --help`."""

import sys

from lungopacity.cli import main

if __name__ == "__main__":
    sys.exit(main(["nightly", *sys.argv[1:]]))
