"""Damaged, lying and hostile files through the whole of reading: fetch, unpack, decode.

    python -m tests.fuzz --inputs 20000 --seed 0

Every input must give rows with a status and a code, must end no process, and may take at most 2 GiB
and 10 s (of CPU time, because clock time depends on what else the machine does).

Seed and number determine an input: `--first 1234 --inputs 1` makes and reads that one again, given
the same fixtures. These include the DICOM files beside the checkout, if there are any; a digest of
all fixtures is printed. Inputs that crashed a decoder, were slow or broke a condition are kept
under `--folder`.
"""

import sys

from tests.fuzz.run import main

if __name__ == "__main__":
    sys.exit(main())
