"""TIFF: whether all the pages that a file begins are in it."""

from __future__ import annotations

from typing import Literal

from lungopacity.errors import ErrorCode, ImageError, Stage
from lungopacity.radiograph.film import DecodeLimits

_ENTRY_BYTES = 12


def check_pages(data: bytes, limits: DecodeLimits) -> None:
    """Walk the directories (TIFF 6.0, section 2), one a page.

    Raises `ImageError`: `truncated` where one is cut, which Pillow takes for the last page;
    `too_large` where there are more than the limit, before Pillow takes a while to count them.
    """
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)

    found: set[int] = set()
    at = number(4, 4)
    while at and at not in found:
        found.add(at)
        limits.check_frames(len(found))
        following = at + 2 + _ENTRY_BYTES * number(at, 2)
        if following + 4 > len(data):
            raise ImageError(ErrorCode.TRUNCATED, Stage.DECODE, "the TIFF ends before its pages do")
        at = number(following, 4)
