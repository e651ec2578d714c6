"""Ray job entry point: `ray job submit --working-dir . -- python jobs/train.py …`, options as in
`lungopacity train --help`."""

import sys

from lungopacity.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
