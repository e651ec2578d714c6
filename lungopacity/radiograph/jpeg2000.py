"""JPEG 2000: reads the sizes in a codestream's main header (ITU-T T.800 A.5.1), and checks that all
tiles are there."""

from __future__ import annotations

from dataclasses import dataclass

_CODESTREAM = b"\xff\x4f\xff\x51"
"""SOC, and the marker of SIZ, which follows it directly."""
_BOXED = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
"""The start of a JP2 file (I.5.1). Some systems put whole ones into DICOM."""
_CODESTREAM_BOX = b"jp2c"
_START_OF_TILE = b"\xff\x90\x00\x0a"
_TILE_HEADER_BYTES = 12


def is_jpeg_2000(data: bytes) -> bool:
    """Whether the data begin with a JPEG 2000 codestream, either bare or in the boxes of a JP2."""
    return data[:4] == _CODESTREAM or data[:12] == _BOXED


@dataclass(frozen=True)
class Siz:
    """The sizes of a codestream."""

    rows: int
    columns: int
    tiles: int | None
    """None if the tiles' size is zero."""
    components: int
    bits: tuple[int, ...]
    """Bits per sample of each component."""


def siz_of(data: bytes) -> Siz | None:
    """The sizes of the codestream, in boxes or bare; None if there is none."""
    start = data.find(_CODESTREAM)
    if start < 0:
        return None
    # Extent and offset of the image on the reference grid; size and offset of the tiles.
    x, y, x0, y0, width, height, tile_x0, tile_y0 = (
        int.from_bytes(data[at : at + 4], "big") for at in range(start + 8, start + 40, 4)
    )
    tiles = None
    if width and height:
        tiles = -(-(x - tile_x0) // width) * -(-(y - tile_y0) // height)
    components = int.from_bytes(data[start + 40 : start + 42], "big")
    depths = data[start + 42 : start + 42 + 3 * components : 3]
    bits = tuple((depth & 0x7F) + 1 for depth in depths)
    return Siz(y - y0, x - x0, tiles, components, bits)


def bits_of_jpeg_2000(data: bytes) -> int:
    """Bits per sample of the deepest component; 0 if no codestream is found."""
    size = siz_of(data)
    return max(size.bits, default=0) if size else 0


def is_cut_jpeg_2000(data: bytes) -> bool:
    """Whether a JPEG 2000 codestream, in boxes or bare, lacks a tile or the end of one.

    OpenJPEG gives black for a tile that is missing, or that ends right after its header.
    """
    size = siz_of(data)
    if size is None:
        return False
    at = data.find(_START_OF_TILE, data.find(_CODESTREAM))
    if at < 0:
        return True
    if size.tiles is None:
        return False
    found: set[bytes] = set()
    while data.startswith(_START_OF_TILE, at):
        # SOT (A.4.2): the tile's number, and its length; 0 means up to the end.
        found.add(data[at + 4 : at + 6])
        length = int.from_bytes(data[at + 6 : at + 10], "big") or len(data) - at
        if length <= _TILE_HEADER_BYTES or at + length > len(data):
            return True
        at += length
    return len(found) < size.tiles


def has_endless_box(data: bytes) -> bool:
    """Whether a box of zero length comes before the codestream of a JP2 (I.4): pydicom advances by
    that length, and so loops for ever."""
    at = len(_BOXED)
    while data.startswith(_BOXED) and at < len(data) and data[at + 4 : at + 8] != _CODESTREAM_BOX:
        length = int.from_bytes(data[at : at + 4], "big")
        if not length:
            return True
        at += length
    return False
