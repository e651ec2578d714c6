"""JPEG: the header of a codestream, and a fast decoder to grey pixels."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lungopacity.errors import ErrorCode, ImageError, Stage
from lungopacity.radiograph.jpeg2000 import is_jpeg_2000, siz_of

END_OF_IMAGE = b"\xff\xd9"

_APP0, _APP1, _APP14 = 0xE0, 0xE1, 0xEE
_ADOBE_COLOURS = {0: "RGB", 1: "YBR_FULL"}
"""Colours of three components, by the transform in Adobe's marker (T.872, 6.5.3)."""
_JPEG_LS = 0xF7
_COMMENT = 0xFE
# Start of scan, with the length that follows from its number of components (T.81 B.2.3). Coded
# pixels cannot contain one: an FF among them is always followed by 00.
_SCAN_HEADER = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
# Start of frame of each process (ITU-T T.81 table B.1), without DHT, JPG, DAC, and JPEG-LS (T.87).
_START_OF_FRAME = {*range(0xC0, 0xD0), _JPEG_LS} - {0xC4, 0xC8, 0xCC}
_EXTRANEOUS = re.compile("extraneous bytes before marker 0x(..)")
_BEHIND_PIXELS = {*(f"d{restart}" for restart in range(8)), "d9", "dc"}
"""RST, EOI, DNL (T.81 table B.1)."""
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_ARITHMETIC = {0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_BEHIND_A_WHOLE_SCAN = [bytes(8) + other * 256 for other in (b"\x01", b"\x55", b"\xaa")]
"""Bytes after a whole scan of arithmetic coding that no decoder should reach, except for some of
the zeros: a coder omits zeros at the end of a scan (T.81 D.1.8), up to 4 for films."""


@dataclass(frozen=True)
class JpegHeader:
    """The header of a JPEG, JPEG-LS or JPEG 2000 codestream."""

    rows: int
    columns: int
    components: int
    bits: int
    """Per sample; in JPEG 2000, of the first component."""
    may_be_turned: bool
    """Exif or XMP (APP1) comes before the pixels, and may name an orientation."""
    progressive: bool
    comments: tuple[bytes, ...]
    is_jpeg_ls: bool = False
    is_arithmetic: bool = False
    """Arithmetic coding instead of Huffman codes."""
    colours: str | None = None
    """RGB or YBR_FULL if the codestream itself tells; None if it does not, and for JFIF."""


def read_header(frame: bytes) -> JpegHeader | None:
    """The header of the codestream; None for another format, or a damaged header."""
    if is_jpeg_2000(frame):
        size = siz_of(frame)
        if size is None:
            return None
        bits = size.bits[0] if size.bits else 0
        return JpegHeader(size.rows, size.columns, size.components, bits, False, False, ())
    if frame[:2] != b"\xff\xd8":
        return None
    comments: list[bytes] = []
    adobe: int | None = None
    may_be_turned, is_jfif, at = False, False, 2
    while at + 10 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
        if marker in _START_OF_FRAME:
            rows, columns = (int.from_bytes(frame[at + i : at + i + 2], "big") for i in (5, 7))
            progressive = marker in _PROGRESSIVE
            bits, components = frame[at + 4], frame[at + 9]
            samplings = set(frame[at + 11 : at + 10 + 3 * components : 3])
            colours = None
            if components == 3 and not is_jfif and marker != _JPEG_LS:
                # Nobody gives green or blue fewer samples than red.
                unmarked = "YBR_FULL" if len(samplings) > 1 else None
                colours = unmarked if adobe is None else _ADOBE_COLOURS.get(adobe)
            return JpegHeader(
                rows,
                columns,
                components,
                bits,
                may_be_turned,
                progressive,
                tuple(comments),
                is_jpeg_ls=marker == _JPEG_LS,
                is_arithmetic=marker in _ARITHMETIC,
                colours=colours,
            )
        is_jfif = is_jfif or (marker == _APP0 and frame[at + 4 : at + 9] == b"JFIF\0")
        if marker == _APP14 and frame[at + 4 : at + 9] == b"Adobe" and end >= at + 16:
            adobe = frame[at + 15]
        may_be_turned = may_be_turned or marker == _APP1
        if marker == _COMMENT:
            comments.append(frame[at + 4 : end])
        at = end
    return None


def scans_of(frame: bytes) -> int:
    """How many scans a JPEG has, including those of thumbnails in its metadata."""
    return len(_SCAN_HEADER.findall(frame))


def _is_before_pixels(warning: str, data: bytes) -> bool:
    """Whether libjpeg found its extraneous bytes in the header, where they do no harm. After a
    scan, or at its restart markers, they are left over because damage ended it too early."""
    found = _EXTRANEOUS.search(warning)
    return found is not None and found[1] not in _BEHIND_PIXELS and scans_of(data) < 2


def decode_grey_jpeg(
    data: bytes, header: JpegHeader, at_least: int | None = None
) -> npt.NDArray[np.uint8] | None:
    """Pixels of a JPEG, or the luma of a coloured one; None if this decoder cannot give them.

    at_least: the longer side that is enough, in pixels; scales the DCT. Returns (height, width).
    Raises `ImageError` (`truncated`, `corrupt_image`) if pixels were lost: libjpeg itself only
    warns, and fills the rest with grey.
    """
    import simplejpeg

    if header.is_arithmetic:
        _check_last_scan(data)
    colours = "CMYK" if header.components == 4 else "GRAY"
    try:
        if at_least is None or max(header.rows, header.columns) <= at_least:
            pixels = simplejpeg.decode_jpeg(data, colours)
        else:
            scale = at_least / max(header.rows, header.columns)
            smallest = [max(1, int(side * scale)) for side in (header.rows, header.columns)]
            pixels = simplejpeg.decode_jpeg(
                data, colours, min_height=smallest[0], min_width=smallest[1]
            )
    except ValueError as error:
        warning = str(error).lower()
        if "premature end" in warning:
            raise ImageError(
                ErrorCode.TRUNCATED, Stage.DECODE, "the JPEG ends before its pixels do"
            ) from error
        damaged = "corrupt jpeg data" in warning and not _is_before_pixels(warning, data)
        if damaged or "inconsistent progression" in warning:
            raise ImageError(
                ErrorCode.CORRUPT_IMAGE, Stage.DECODE, "the JPEG's coded pixels are damaged"
            ) from error
        # 12 bits, or harmless bytes: Pillow's own libjpeg may manage.
        return None
    if header.components == 4:
        return None  # CMYK is decoded here only to find lost pixels
    grey: npt.NDArray[np.uint8] = pixels.reshape(pixels.shape[:2])
    return grey


def _check_last_scan(data: bytes) -> None:
    """Raise `ImageError` (`truncated`) if an arithmetic-coded JPEG was cut inside a scan.

    When its bytes end, a decoder goes on with zeros and makes pixels of them until the film is
    full, and no library reports that. So the file is decoded again with other bytes appended: if
    the pixels differ, it was cut.
    """
    import imagecodecs

    end = data.rfind(END_OF_IMAGE)
    longer = [data[:end] + more + END_OF_IMAGE for more in _BEHIND_A_WHOLE_SCAN]
    try:
        pixels = imagecodecs.jpeg8_decode(data)
    except imagecodecs.Jpeg8Error:
        return  # the next decoder reports it
    with contextlib.suppress(imagecodecs.Jpeg8Error):
        if all(np.array_equal(pixels, imagecodecs.jpeg8_decode(other)) for other in longer):
            return
    raise ImageError(ErrorCode.TRUNCATED, Stage.DECODE, "the JPEG ends before its pixels do")
