"""Ray job entry point: `ray job submit --working-dir . -- python jobs/screen.py …`, options as in
`lungopacity screen --help`."""

import sys

from lungopacity.cli import main

if __name__ == "__main__":
    sys.exit(main(["screen", *sys.argv[1:]]))
