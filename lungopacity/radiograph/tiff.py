"""TIFF: checks that all pages are in the file, finds those that are films and damage that libtiff
ignores, and decodes grey layouts that Pillow does not know."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lungopacity.errors import ErrorCode, ImageError, Stage
from lungopacity.radiograph.film import DecodeLimits
from lungopacity.radiograph.jpeg import decode_grey_jpeg, read_header

_SIGNATURES = (b"II*\x00", b"MM\x00*")
_BIG_SIGNATURES = (b"II+\x00", b"MM\x00+")
_BYTES_OF_TYPE = {3: 2, 4: 4}
"""Types SHORT and LONG."""

SUBFILE, COLUMNS, ROWS, BITS, PHOTOMETRIC, ORIENTATION = 254, 256, 257, 258, 262, 274
SAMPLES, PLANES, EXTRA_SAMPLES, SAMPLE_FORMAT = 277, 284, 338, 339
_COMPRESSION, _JPEG_TABLES = 259, 347
_STRIPS, _TILES = (273, 279), (324, 325)
"""Tags of their offsets and of their sizes in bytes (TIFF 6.0, sections 8 and 15)."""
_JPEG, _DEFLATE = 7, (8, 32946)
"""Values of _COMPRESSION (Adobe's TIFF Technical Note 2 and its supplement)."""
_WEBP = 50001
"""Value of _COMPRESSION in libtiff. Pillow's libtiff is built without it."""
_INFLATED_AT_ONCE = 1 << 20
_REDUCED, _MASK = 1, 4
"""Bits of SUBFILE (TIFF 6.0, section 8): a smaller copy, or the mask, of another page."""
WHITE_IS_ZERO = 0
ONE_A_SAMPLE = 2
"""Value of PLANES: red, green and blue are stored in separate planes."""
NOT_MULTIPLIED = 2
"""Value of EXTRA_SAMPLES (TIFF 6.0, section 18): colours are not premultiplied by their alpha."""
UNSIGNED, SIGNED = 1, 2
"""Values of SAMPLE_FORMAT (TIFF 6.0, section 19)."""


def is_tiff(data: bytes) -> bool:
    """Whether the first bytes are those of a TIFF or a BigTIFF."""
    return data[:4] in _SIGNATURES + _BIG_SIGNATURES


def check_pages(data: bytes, limits: DecodeLimits) -> list[int]:
    """Walk the directories, one per page (TIFF 6.0, section 2; BigTIFF has wider numbers).

    Returns the offset of each page, at least one. Raises `ImageError`: `truncated` if there is
    none, or if one is cut, which Pillow takes for the last page; `too_large` for more pages than
    the limit, which Pillow would take long to count; `unsupported` for a big-endian BigTIFF, which
    Pillow takes for a plain TIFF.
    """
    form = _Form(data)
    if form.big and form.order == "big":
        raise ImageError(
            ErrorCode.UNSUPPORTED,
            Stage.DECODE,
            "a big-endian BigTIFF; convert it to a little-endian one",
        )
    found: dict[int, None] = {}
    at = form.number(form.offset, form.offset)
    while at and at not in found:
        found[at] = None
        limits.check_frames(len(found))
        following = at + form.count + form.entry * form.number(at, form.count)
        if following + form.offset > len(data):
            raise ImageError(ErrorCode.TRUNCATED, Stage.DECODE, "the TIFF ends before its pages do")
        at = form.number(following, form.offset)
    if not found:
        # Writers fill in the first page's offset last: this one did not finish, or the file is cut.
        raise ImageError(ErrorCode.TRUNCATED, Stage.DECODE, "a TIFF without a page")
    return list(found)


class _Form:
    """The byte order of a file, and the width of its numbers in bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
        self.big = data[:4] in _BIG_SIGNATURES
        # Widths of an offset, of the number of entries, and of an entry.
        self.offset, self.count, self.entry = (8, 8, 20) if self.big else (4, 2, 12)

    def number(self, at: int, size: int) -> int:
        return int.from_bytes(self._data[at : at + size], self.order)


def films_of(data: bytes, pages: Sequence[int]) -> list[int]:
    """Indices of the pages that hold an image of their own. Thumbnails, smaller copies of a pyramid
    and masks do not, unless there is nothing else. `pages`: the offset of each."""
    own = [number for number, page in enumerate(pages) if not _is_copy_or_mask(data, page)]
    return own or list(range(len(pages)))


def _is_copy_or_mask(data: bytes, page: int) -> bool:
    form = _Form(data)
    # Entries are sorted and no other tag is as low, so only the first of maybe millions is read.
    first = page + form.count
    is_there = form.number(page, form.count) > 0 and form.number(first, 2) == SUBFILE
    size = _BYTES_OF_TYPE.get(form.number(first + 2, 2), 0)
    kind = form.number(first + 4 + form.offset, size) if is_there else 0
    return bool(kind & (_REDUCED | _MASK))


def tags_of(data: bytes, page: int) -> dict[int, int]:
    """The page's tags that hold a single number of 16 or 32 bits. `page`: its offset."""
    form = _Form(data)
    first, value = page + form.count, 4 + form.offset
    last = first + form.entry * form.number(page, form.count)
    return {
        form.number(at, 2): form.number(at + value, _BYTES_OF_TYPE[form.number(at + 2, 2)])
        for at in range(first, last, form.entry)
        if form.number(at + 2, 2) in _BYTES_OF_TYPE and form.number(at + 4, form.offset) == 1
    }


def check_coded_pixels(data: bytes, tags: Mapping[int, Any]) -> None:
    """Raise `ImageError` (`truncated`, `corrupt_image`) for damage that libtiff ignores: it fills
    lost pixels of JPEG with grey, and does not check the checksum of deflate. Raises `unsupported`
    for a page compressed as WebP. `tags`: all tags of the page.
    """
    compression = tags.get(_COMPRESSION)
    if compression == _WEBP:
        raise ImageError(
            ErrorCode.UNSUPPORTED, Stage.DECODE, "a TIFF compressed as WebP; convert it to PNG"
        )
    if compression == _JPEG:
        tables = tags.get(_JPEG_TABLES, b"")[2:-2]  # without SOI and EOI
        for coded in _parts(data, tags):
            stream = coded[:2] + tables + coded[2:]
            header = read_header(stream)
            if header is not None:
                decode_grey_jpeg(stream, header, at_least=1)  # only for its errors
    elif compression in _DEFLATE:
        for coded in _parts(data, tags):
            _check_deflate(coded)


def _parts(data: bytes, tags: Mapping[int, Any]) -> Iterator[bytes]:
    """The coded strips or tiles of a page."""
    begins, sizes = _TILES if _TILES[0] in tags else _STRIPS
    for begin, size in zip(tags.get(begins, ()), tags.get(sizes, ()), strict=False):
        if size:  # 0 marks one that was left out, which libtiff refuses by itself
            yield data[begin : begin + size]


def _check_deflate(coded: bytes) -> None:
    inflater = zlib.decompressobj()
    try:
        while not inflater.eof:
            given = inflater.decompress(coded, _INFLATED_AT_ONCE)
            coded = inflater.unconsumed_tail
            if not given and not inflater.eof:
                raise ImageError(
                    ErrorCode.TRUNCATED, Stage.DECODE, "the TIFF ends before its pixels do"
                )
    except zlib.error as error:
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "the TIFF's coded pixels are damaged"
        ) from error


def grey_values(data: bytes, index: int, tags: dict[int, int]) -> npt.NDArray[np.uint16]:
    """The values of a grey page of more than 8 bits, (height, width), inverted if white is zero.

    Raises `ImageError` (`unsupported`, `corrupt_image`).
    """
    import imagecodecs

    bits = tags.get(BITS, 1)
    unsigned = tags.get(SAMPLES, 1) == 1 and tags.get(SAMPLE_FORMAT, UNSIGNED) == UNSIGNED
    if not unsigned or tags.get(PHOTOMETRIC) not in (0, 1) or not 8 < bits <= 16:
        raise ImageError(
            ErrorCode.UNSUPPORTED,
            Stage.DECODE,
            "an uncommon layout of samples; convert it to grey of 8 or 16 bits",
        )
    try:
        values = imagecodecs.tiff_decode(data, index=index)
    except (imagecodecs.TiffError, NotImplementedError) as error:
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "the TIFF's pixels cannot be decoded"
        ) from error
    if values.shape != (tags[ROWS], tags[COLUMNS]) or values.dtype != np.uint16:
        raise ImageError(
            ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "the TIFF's pixels are not what it declares"
        )
    return (1 << bits) - 1 - values if tags[PHOTOMETRIC] == WHITE_IS_ZERO else values
