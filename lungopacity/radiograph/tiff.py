"""TIFF: whether all the pages that a file begins are in it."""

from __future__ import annotations

from typing import Literal

from lungopacity.errors import ErrorCode, ImageError, Stage
from lungopacity.radiograph.film import DecodeLimits

_SIGNATURES = (b"II*\x00", b"MM\x00*")
_BIG_SIGNATURES = (b"II+\x00", b"MM\x00+")


def is_tiff(data: bytes) -> bool:
    """Whether the first bytes are those of a TIFF or a BigTIFF."""
    return data[:4] in _SIGNATURES + _BIG_SIGNATURES


def check_pages(data: bytes, limits: DecodeLimits) -> None:
    """Walk the directories (TIFF 6.0, section 2; of BigTIFF with wider numbers), one a page.

    Raises `ImageError`: `truncated` where one is cut, which Pillow takes for the last page;
    `too_large` where there are more than the limit, before Pillow takes a while to count them;
    `unsupported` for a BigTIFF that begins with MM, which Pillow takes for another TIFF.
    """
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    big = data[:4] in _BIG_SIGNATURES
    if big and order == "big":
        raise ImageError(
            ErrorCode.UNSUPPORTED, Stage.DECODE, "a BigTIFF of big-endian numbers; write it anew"
        )
    # Bytes of an offset, of the number of entries, and of an entry.
    offset, count, entry = (8, 8, 20) if big else (4, 2, 12)

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)

    found: set[int] = set()
    at = number(offset, offset)
    while at and at not in found:
        found.add(at)
        limits.check_frames(len(found))
        following = at + count + entry * number(at, count)
        if following + offset > len(data):
            raise ImageError(ErrorCode.TRUNCATED, Stage.DECODE, "the TIFF ends before its pages do")
        at = number(following, offset)
