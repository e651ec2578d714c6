"""The decoder's process with codecs that fail on command, as C code does on hostile files."""

import ctypes
import hashlib
import os
import signal
import sys
import time

from lungopacity.archive.content import content_rows
from lungopacity.archive.decoder import serve


def rows_of(data, settings):
    if data.startswith(b"CRASH"):
        for terminal in (1, 2):
            os.write(terminal, data[:100])
        ctypes.string_at(0)  # a segmentation fault
    if data.startswith(b"HANG"):
        time.sleep(600)
    if data.startswith(b"SPIN"):
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # in C, deaf to Python's signals
    if data.startswith(b"KILLED"):
        os.kill(os.getpid(), signal.SIGKILL)  # as a node does that is short of memory
    if data.startswith(b"ONCE"):
        path = data[4:].decode()
        if not os.path.exists(path):
            open(path, "w").close()
            os._exit(3)
        data = b"junk"
    for number, row in enumerate(content_rows(data, settings)):
        if number == 2 and b"THIRD" in data:
            ctypes.string_at(0)
        yield row
    if data.startswith(b"LATE"):
        os.abort()


if __name__ == "__main__":
    serve(sys.argv[1:], rows_of)
