"""Damaged files through the whole of reading; `python -m tests.fuzz` tells more."""
