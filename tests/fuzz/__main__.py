"""Damaged, lying and hostile files through the whole of reading: fetch, unpack, decode.

    python -m tests.fuzz --inputs 20000 --seed 0

Every input must give rows with a status and a code, end no process, take at most 2 GiB and 10 s (of
CPU: the clock tells as much of what else the machine does).
An input is known by its seed and number: `--first 1234 --inputs 1` makes and reads that one again,
given the same fixtures (DICOM files beside the checkout are among them where they are present; the
digest of all of them is printed). What crashed a decoder, was slow or broke a condition is kept
under `--folder`.
"""

import sys

from tests.fuzz.run import main

if __name__ == "__main__":
    sys.exit(main())
