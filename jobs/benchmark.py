"""Ray job entry point: `ray job submit --working-dir . -- python jobs/benchmark.py …`, options as
in `lungopacity benchmark --help`."""

import sys

from lungopacity.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
