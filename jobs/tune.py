"""Ray job entry point: `ray job submit --working-dir . -- python jobs/tune.py …`, options as in
`lungopacity tune --help`."""

import sys

from lungopacity.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
