"""Small files that unpack to giants, or keep a decoder busy forever."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pydicom
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from tests.films import encoded, grey_film, tar
from tests.fuzz.fixtures import Fixture, own_fixtures, stored_object, written, zipped, zstd_packed
from tests.fuzz.mutations import sized_jpeg, sized_jpeg2000, with_elements, with_tiff_tags

MIB = 1 << 20


def _zeros(size: int, wbits: int) -> bytes:
    """`size` zeros, deflated: raw (-15), or with a zlib (15) or gzip (31) header."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    # After a full flush, the same zeros are compressed to the same bytes again.
    rest = packer.compress(bytes(size % MIB)) + packer.flush()
    raw = block * (size // MIB) + rest
    if wbits == -15:
        return raw
    if wbits == 15:
        return b"\x78\xda" + raw + struct.pack(">2H", size % 65_521, 1)
    checksum = 0
    for _ in range(size // MIB):
        checksum = zlib.crc32(bytes(MIB), checksum)
    checksum = zlib.crc32(bytes(size % MIB), checksum)
    return b"\x1f\x8b\x08" + bytes(7) + raw + struct.pack("<2I", checksum, size % 2**32)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width: int, height: int, bits: int, colour: int, *extra: bytes, pixels: bytes) -> bytes:
    header = struct.pack(">2I5B", width, height, bits, colour, 0, 0, 0)
    chunks = [_chunk(b"IHDR", header), *extra, _chunk(b"IDAT", pixels), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _png_of_zeros(side: int, bits: int = 8, colour: int = 0) -> bytes:
    samples = {0: 1, 2: 3, 6: 4}[colour]
    row = 1 + (side * bits * samples + 7) // 8
    return _png(side, side, bits, colour, pixels=_zeros(side * row, 15))


def _png_with(name: bytes, content: bytes) -> bytes:
    film = encoded(grey_film())
    return film[:33] + _chunk(name, content) + film[33:]


def _zip_around(packed: bytes, method: int, size: int, checksum: int = 0) -> bytes:
    """A zip with one member, already compressed, that states this size."""
    data = bytearray(zipped({"a.png": packed}, zipfile.ZIP_STORED))
    for header, places in ((0, (8, 14, 22)), (data.index(b"PK\x01\x02"), (10, 16, 24))):
        for place, form, value in zip(
            places, ("<H", "<I", "<I"), (method, checksum, size), strict=True
        ):
            struct.pack_into(form, data, header + place, value)
    return bytes(data)


def _zip_of_zeros(size: int) -> bytes:
    packed = _zeros(size, 31)
    checksum, _ = struct.unpack("<2I", packed[-8:])
    return _zip_around(packed[10:-8], zipfile.ZIP_DEFLATED, size, checksum)


def _zip_that_hides(size: int, method: int) -> bytes:
    """A zip that states a much smaller size than it unpacks to."""
    data = zipped({"a.png": bytes(size)}, method)
    start, end = 30 + len("a.png"), data.index(b"PK\x01\x02")
    return _zip_around(data[start:end], method, 100_000)


def _zip_of_overlapping(count: int = 1000) -> bytes:
    """A zip whose members all share one kernel of zeros (D. Fifield, WOOT 2019)."""
    kernel = zipped({"a": bytes(16 * MIB)})
    start, end = kernel.index(b"PK\x01\x02"), kernel.index(b"PK\x05\x06")
    entry = kernel[start:end]
    finish = struct.pack(
        "<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(entry) * count, start, 0
    )
    return kernel[:start] + entry * count + finish


def _nested_zips(depth: int = 4) -> bytes:
    data = zipped({"0.bin": bytes(64 * MIB)})
    for level in range(depth):
        data = zipped({f"{level}-{number}.zip": data for number in range(8)})
    return data


def _tiff_bomb(compression: str, side: int) -> bytes:
    data = encoded(np.zeros((512, 512), np.uint8), "TIFF", compression=compression)
    return with_tiff_tags(data, {256: side, 257: side, 278: side})


def _tiff_pages(count: int, side: int) -> bytes:
    """A TIFF whose pages all share the strip of the first."""
    data = bytearray(encoded(np.zeros((side, side), np.uint8), "TIFF", compression="tiff_lzw"))
    (at,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, at)
    directory = bytes(data[at : at + 2 + 12 * entries])
    data += b"\0" * (len(data) % 2)
    for _number in range(count - 1):
        struct.pack_into("<I", data, at + len(directory), len(data))
        at = len(data)
        data += directory + bytes(4)
    return bytes(data)


def _tiff_in_a_circle() -> bytes:
    data = bytearray(encoded(grey_film(), "TIFF"))
    (at,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, at)
    struct.pack_into("<I", data, at + 2 + 12 * entries, at)
    return bytes(data)


def _jpeg_of_scans(count: int, side: int) -> bytes:
    """A progressive JPEG whose last scan is repeated: each scan walks all blocks."""
    data = encoded(np.zeros((side, side), np.uint8), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def _encapsulated(frame: bytes, syntax: UID, side: int, frames: int, **elements: Any) -> bytes:
    dataset = stored_object(
        np.zeros((2, 2)), **{"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7} | elements
    )
    dataset.Rows = dataset.Columns = side
    dataset.NumberOfFrames = frames
    dataset.PixelData = encapsulate([frame] * frames)
    return written(dataset, syntax)


def _rle_zeros(size: int) -> bytes:
    runs = b"\x81\0" * (size // 128)
    return struct.pack("<16I", 1, 64, *[0] * 14) + runs


def own(name: str) -> bytes:
    return next(fixture.data for fixture in own_fixtures() if fixture.name == name)


def _jpeg_ls_cut() -> bytes:
    """The start of a JPEG-LS frame from a DICOM object: its header and a part of its pixels."""
    dataset = pydicom.dcmread(io.BytesIO(own("jpeg-ls.dcm")))
    return get_frame(dataset.PixelData, 0, number_of_frames=1)[:1000]


def _sparse_tar() -> bytes:
    header = tarfile.TarInfo("a.png")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 0
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[156:157] = b"S"
    block[386:398] = block[398:410] = b"%011o\0" % 0
    block[483:495] = b"%011o\0" % (8**11 - 1)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(1024)


def _deflated_dicom(size: int) -> bytes:
    data = written(stored_object(grey_film().astype(np.uint16)), DeflatedExplicitVRLittleEndian)
    meta = 132 + 12 + struct.unpack_from("<I", data, 140)[0]
    return data[:meta] + _zeros(size, -15)


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "png of zeros, 50,000 x 50,000": ("png", lambda: _png_of_zeros(50_000)),
    "png of one bit, 50,000 x 50,000": ("png", lambda: _png_of_zeros(50_000, 1)),
    "png of zeros, 9,999 x 9,999": ("png", lambda: _png_of_zeros(9_999)),
    "png of colour, 9,999 x 9,999": ("png", lambda: _png_of_zeros(9_999, 8, 6)),
    "png whose pixels do not end": (
        "png", lambda: _png(120, 120, 8, 0, pixels=_zeros(512 * MIB, 15)),
    ),
    "png with a text bomb": (
        "png", lambda: _png_with(b"zTXt", b"a\0\0" + _zeros(512 * MIB, 15)),
    ),
    "png with a profile bomb": (
        "png", lambda: _png_with(b"iCCP", b"a\0\0" + _zeros(512 * MIB, 15)),
    ),
    "tiff lzw, 50,000 x 50,000": ("tif", lambda: _tiff_bomb("tiff_lzw", 50_000)),
    "tiff deflate, 50,000 x 50,000": ("tif", lambda: _tiff_bomb("tiff_adobe_deflate", 50_000)),
    "tiff deflate, 9,999 x 9,999": ("tif", lambda: _tiff_bomb("tiff_adobe_deflate", 9_999)),
    "tiff of 4,000 pages in one strip": ("tif", lambda: _tiff_pages(4_000, 2_000)),
    "tiff whose pages run in a circle": ("tif", _tiff_in_a_circle),
    "jpeg of 4,000 scans": ("jpg", lambda: _jpeg_of_scans(4_000, 4_000)),
    "jpeg, 50,000 x 50,000": (
        "jpg", lambda: sized_jpeg(encoded(grey_film(), "JPEG"), 50_000, 50_000),
    ),
    "jpeg 2000, 50,000 x 50,000": (
        "j2k",
        lambda: sized_jpeg2000(encoded(grey_film(), "JPEG2000", no_jp2=True), 50_000, 50_000),
    ),
    "bmp, 50,000 x 50,000": (
        "bmp",
        lambda: encoded(grey_film(), "BMP")[:18] + struct.pack("<2i", 50_000, 50_000)
        + encoded(grey_film(), "BMP")[26:],
    ),
    "gzip of zeros": ("gz", lambda: _zeros(1024 * MIB, 31)),
    "gzip in gzip": ("gz", lambda: gzip.compress(_zeros(1024 * MIB, 31), mtime=0)),
    "gzip of many streams": ("gz", lambda: gzip.compress(b"", mtime=0) * 100_000),
    "zstd of zeros": ("zst", lambda: zstd_packed(bytes(512 * MIB))),
    # Concatenated streams, which unpack as one.
    "xz of zeros": ("xz", lambda: lzma.compress(bytes(32 * MIB), preset=0) * 12),
    "bzip2 of zeros": ("bz2", lambda: bz2.compress(bytes(32 * MIB), 9) * 12),
    "tar of a bomb": ("tar.gz", lambda: gzip.compress(tar({"a.gz": _zeros(1024 * MIB, 31)}))),
    "tar of a hole": ("tar", _sparse_tar),
    "zip of zeros": ("zip", lambda: _zip_of_zeros(1024 * MIB)),
    "zip that hides zeros": ("zip", lambda: _zip_that_hides(64 * MIB, zipfile.ZIP_DEFLATED)),
    "zip that hides bzip2": ("zip", lambda: _zip_that_hides(64 * MIB, zipfile.ZIP_BZIP2)),
    "zip that hides lzma": ("zip", lambda: _zip_that_hides(16 * MIB, zipfile.ZIP_LZMA)),
    "zip in zip in zip": ("zip", _nested_zips),
    "zip of overlapping members": ("zip", _zip_of_overlapping),
    "dicom that inflates to 1 GiB": ("dcm", lambda: _deflated_dicom(1024 * MIB)),
    "dicom of 65,535 x 65,535": (
        "dcm",
        lambda: with_elements(
            written(stored_object(grey_film()), ExplicitVRLittleEndian), Rows=65_535, Columns=65_535
        ),
    ),
    "dicom of 2,147,483,647 frames": (
        "dcm",
        lambda: with_elements(
            written(stored_object(grey_film()), ExplicitVRLittleEndian), NumberOfFrames=2**31 - 1
        ),
    ),
    "dicom rle, 9,984 x 9,984": (
        "dcm", lambda: _encapsulated(_rle_zeros(9_984**2), RLELossless, 9_984, 1),
    ),
    "dicom of 60 rle frames": (
        "dcm", lambda: _encapsulated(_rle_zeros(2_048**2), RLELossless, 2_048, 60),
    ),
    "dicom of 400 jpeg 2000 frames": (
        "dcm",
        lambda: _encapsulated(
            encoded(np.zeros((2_048, 2_048), np.uint8), "JPEG2000", no_jp2=True),
            JPEG2000Lossless, 2_048, 400,
        ),
    ),
    "dicom of nothing but zeros": ("dcm", lambda: bytes(128) + b"DICM" + bytes(64 * MIB)),
    "dicom that inflates to zeros": ("dcm", lambda: _deflated_dicom(500 * MIB)),
    "dicom of a jpeg-ls that does not end": (
        "dcm",
        lambda: with_elements(own("jpeg-ls.dcm"), PixelData=encapsulate([_jpeg_ls_cut()])),
    ),
    "dicom of a jpeg of 4,000 scans": (
        "dcm",
        lambda: _encapsulated(_jpeg_of_scans(4_000, 4_000), JPEGBaseline8Bit, 4_000, 1),
    ),
}  # fmt: skip
"""Small files that declare, or unpack to, something huge: the suffix, and what makes the file."""


@cache
def bomb(name: str) -> Fixture:
    suffix, make = BOMBS[name]
    return Fixture("bomb", f"x.{suffix}", make())
