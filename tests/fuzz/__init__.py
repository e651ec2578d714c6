"""Damaged files through the whole of reading; see `tests/fuzz/__main__.py`."""
