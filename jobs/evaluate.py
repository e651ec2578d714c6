"""Ray job entry point: `ray job submit --working-dir . -- python jobs/evaluate.py …`, options as in
`lungopacity evaluate --help`."""

import sys

from lungopacity.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
