"""Damaged, lying and hostile files through the whole of reading: fetch, unpack, decode.

    python -m tests.fuzz --inputs 20000 --seed 0

Every input must give rows with a status and a code, end no process, take at most 2 GiB and 10 s (of
CPU: the clock tells as much of what else the machine does).
An input is known by its seed and number: `--first 1234 --inputs 1` makes and reads that one again,
given the same fixtures (DICOM files beside the checkout are among them where they are present; the
digest of all of them is printed). What crashed a decoder, was slow or broke a condition is kept
under `--folder`.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import faulthandler
import gzip
import hashlib
import io
import logging
import lzma
import multiprocessing
import os
import random
import resource
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from lungopacity.archive import decoder
from lungopacity.archive.content import ReadSettings
from lungopacity.archive.inventory import take_inventory
from lungopacity.archive.reading import read_images
from lungopacity.errors import REJECTING, ErrorCode, Status
from lungopacity.progress import Progress
from lungopacity.radiograph import ACCEPTABLE, Preprocessing
from lungopacity.results.schema import READ_SCHEMA
from tests.films import dicom, encoded, grey_film, tar
from tests.real_data import DICOM_FOLDER

# All that can be decoded is: a film that is rejected for its header would spare the decoders.
SETTINGS = ReadSettings(Preprocessing(image_size=32), accept=ACCEPTABLE, reject_quality=frozenset())
MAX_SECONDS = 10.0
MAX_MEMORY_BYTES = 2 << 30
IMAGE_KINDS = ("png", "jpeg", "tiff", "jpeg2000", "bmp", "dicom")
_SLOW_SECONDS = 5.0
_HANGS_SECONDS = 120.0
_BATCH = 100
_LARGEST_FIXTURE = 1 << 20
# A folder does not lose, hide or change its files while it is read.
_IMPOSSIBLE = {
    ErrorCode.INTERNAL, ErrorCode.MISSING, ErrorCode.FORBIDDEN, ErrorCode.TIMEOUT,
    ErrorCode.UNAVAILABLE, ErrorCode.CHANGED, ErrorCode.DIGEST_MISMATCH,
}  # fmt: skip


@dataclass(frozen=True)
class Fixture:
    """A valid file, to be damaged."""

    kind: str
    name: str
    """With the suffix that such a file has."""
    data: bytes = field(repr=False)

    @property
    def suffix(self) -> str:
        return "".join(Path(self.name).suffixes[-2:])


@dataclass(frozen=True)
class Input:
    """One file of the run."""

    kind: str
    mutation: str
    name: str
    data: bytes = field(repr=False)


# ------------------------------------------------------------------------------------- fixtures


def _pictures() -> Iterator[Fixture]:
    grey = grey_film(1, 140, 110)
    # A tint that an eye does not see: colour would be rejected.
    rgb = np.stack([grey, grey // 16 * 15 + 8, grey // 16 * 15], axis=-1)
    deep = grey.astype(np.uint16) * 257
    picture = Image.fromarray(grey)

    def of(image: Any, image_format: str, **options: Any) -> bytes:
        return encoded(np.asarray(image), image_format, **options)

    def saved(image: Image.Image, image_format: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, image_format, **options)
        return buffer.getvalue()

    turned = Image.Exif()
    turned[0x0112] = 6
    yield Fixture("png", "grey.png", of(grey, "PNG"))
    yield Fixture("png", "deep.png", of(deep, "PNG"))
    yield Fixture("png", "rgb.png", of(rgb, "PNG"))
    yield Fixture("png", "rgba.png", saved(Image.fromarray(rgb).convert("RGBA"), "PNG"))
    yield Fixture("png", "alpha.png", saved(picture.convert("LA"), "PNG"))
    yield Fixture("png", "palette.png", saved(picture.convert("P"), "PNG"))
    yield Fixture("png", "bits.png", saved(picture.convert("1"), "PNG"))
    yield Fixture("png", "profile.png", saved(picture, "PNG", icc_profile=bytes(range(256)) * 8))
    yield Fixture("jpeg", "grey.jpg", of(grey, "JPEG"))
    yield Fixture("jpeg", "grey-progressive.jpg", of(grey, "JPEG", progressive=True))
    yield Fixture("jpeg", "restarts.jpg", of(grey, "JPEG", restart_marker_rows=1))
    yield Fixture("jpeg", "rgb.jpg", of(rgb, "JPEG"))
    yield Fixture("jpeg", "progressive.jpg", of(rgb, "JPEG", progressive=True))
    yield Fixture("jpeg", "cmyk.jpg", saved(Image.fromarray(rgb).convert("CMYK"), "JPEG"))
    yield Fixture("jpeg", "turned.jpg", of(grey, "JPEG", exif=turned.tobytes()))
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd"):
        yield Fixture("tiff", f"{compression}.tif", of(grey, "TIFF", compression=compression))
    yield Fixture("tiff", "fax.tif", saved(picture.convert("1"), "TIFF", compression="group4"))
    yield Fixture("tiff", "deep.tif", of(deep, "TIFF", compression="tiff_lzw"))
    yield Fixture("tiff", "float.tif", of(grey.astype(np.float32), "TIFF"))
    yield Fixture("tiff", "rgb.tif", of(rgb, "TIFF", compression="tiff_adobe_deflate"))
    pages = [Image.fromarray(grey_film(seed, 100, 100)) for seed in range(3)]
    yield Fixture(
        "tiff",
        "pages.tif",
        saved(pages[0], "TIFF", compression="tiff_lzw", save_all=True, append_images=pages[1:]),
    )
    yield Fixture("jpeg2000", "grey.jp2", of(grey, "JPEG2000"))
    yield Fixture("jpeg2000", "deep.jp2", of(deep, "JPEG2000"))
    yield Fixture("jpeg2000", "rgb.jp2", of(rgb, "JPEG2000", irreversible=True))
    yield Fixture("jpeg2000", "tiles.j2k", of(grey, "JPEG2000", no_jp2=True, tile_size=(64, 64)))
    yield Fixture("bmp", "grey.bmp", of(grey, "BMP"))
    yield Fixture("bmp", "rgb.bmp", of(rgb, "BMP"))
    yield Fixture("bmp", "bits.bmp", saved(picture.convert("1"), "BMP"))


def _dicom_objects() -> Iterator[Fixture]:
    film = grey_film(2, 120, 100)
    stored = film.astype(np.uint16) * 16
    plain = _object(stored)
    yield Fixture("dicom", "explicit.dcm", _written(plain, ExplicitVRLittleEndian))
    yield Fixture("dicom", "implicit.dcm", _written(plain, ImplicitVRLittleEndian))
    yield Fixture("dicom", "big-endian.dcm", _written(_big_endian(stored), ExplicitVRBigEndian))
    yield Fixture("dicom", "deflated.dcm", _written(plain, DeflatedExplicitVRLittleEndian))
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    small = _object(film, **eight, PixelData=film.tobytes())
    for name, syntax, source, options in (
        ("rle", RLELossless, plain, {}),
        ("rle-8", RLELossless, small, {}),
        ("jpeg-ls", JPEGLSLossless, plain, {}),
        ("jpeg-ls-near", JPEGLSNearLossless, small, {"jls_error": 2}),
        ("j2k", JPEG2000Lossless, plain, {}),
        ("j2k-8", JPEG2000Lossless, small, {}),
    ):
        dataset = pydicom.dcmread(io.BytesIO(_written(source, ExplicitVRLittleEndian)))
        dataset.compress(syntax, generate_instance_uid=False, **options)
        yield Fixture("dicom", f"{name}.dcm", _written(dataset, syntax))
    jpeg = _object(film, **eight, PixelData=encapsulate([encoded(film, "JPEG")]))
    yield Fixture("dicom", "jpeg.dcm", _written(jpeg, JPEGBaseline8Bit))
    films = [grey_film(seed, 100, 100).astype(np.uint16) * 16 for seed in range(3)]
    cine = _object(films[0], NumberOfFrames=3, PixelData=np.stack(films).tobytes())
    yield Fixture("dicom", "cine.dcm", _written(cine, ExplicitVRLittleEndian))
    frames = [encoded(grey_film(seed, 100, 100), "JPEG") for seed in range(3)]
    cine = _object(films[0], **eight, NumberOfFrames=3, PixelData=encapsulate(frames))
    yield Fixture("dicom", "cine-jpeg.dcm", _written(cine, JPEGBaseline8Bit))


def _object(stored: np.ndarray, **elements: Any) -> pydicom.Dataset:
    dataset = pydicom.dcmread(
        io.BytesIO(
            dicom(
                stored.astype(np.uint16), SOPInstanceUID="2.25.1", WindowCenter=2048,
                WindowWidth=4096, BodyPartExamined="CHEST", ViewPosition="PA", **elements,
            )
        ),
        force=True,
    )  # fmt: skip
    dataset.preamble = bytes(128)
    dataset.file_meta.MediaStorageSOPInstanceUID = "2.25.1"  # the same bytes in every run
    return dataset


def _big_endian(stored: np.ndarray) -> pydicom.Dataset:
    return _object(stored, PixelData=stored.astype(">u2").tobytes())


def _written(dataset: pydicom.Dataset, syntax: UID) -> bytes:
    buffer = io.BytesIO()
    dataset.file_meta.TransferSyntaxUID = syntax
    list(dataset.iterall())  # parsed, or pydicom writes elements in the encoding it found them in
    if syntax.is_compressed and syntax != DeflatedExplicitVRLittleEndian:
        dataset["PixelData"].is_undefined_length = True
        dataset["PixelData"].VR = "OB"
    pydicom.dcmwrite(
        buffer,
        dataset,
        implicit_vr=syntax.is_implicit_VR,
        little_endian=syntax.is_little_endian,
        force_encoding=True,
    )
    return buffer.getvalue()


def _foreign_objects() -> Iterator[Fixture]:
    """What pydicom ships, and what lies beside the checkout."""
    known = get_testdata_file("CT_small.dcm", download=False)
    folders = [(Path(known).parent, "pydicom"), (DICOM_FOLDER, "beside")]
    for folder, origin in folders:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            named = path.suffix == ".dcm" or path.name.startswith("DICOMDIR")
            if named and path.is_file() and path.stat().st_size <= _LARGEST_FIXTURE:
                name = f"{path.stem}.dcm" if path.suffix == ".dcm" else path.name
                yield Fixture("dicom", f"{origin}-{name}", path.read_bytes())


def _zip(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()


def _zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def _parquet(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def _containers() -> Iterator[Fixture]:
    films = {f"a/{seed}.png": encoded(grey_film(seed, 100, 100)) for seed in range(3)}
    films["a/3.jpg"] = encoded(grey_film(3, 100, 100), "JPEG")
    films["notes.txt"] = b"hello"
    films["a/4.dcm"] = _written(
        _object(grey_film(4, 100, 100).astype(np.uint16) * 16), ExplicitVRLittleEndian
    )
    plain = tar(films)
    yield Fixture("tar", "x.tar", plain)
    for form, name in ((tarfile.GNU_FORMAT, "gnu"), (tarfile.PAX_FORMAT, "pax")):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
            for member, data in films.items():
                info = tarfile.TarInfo("ü" * 120 + member)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
        yield Fixture("tar", f"{name}.tar", buffer.getvalue())
    yield Fixture("tar.gz", "x.tar.gz", gzip.compress(plain, mtime=0))
    yield Fixture("tar.zst", "x.tar.zst", _zstd(plain))
    yield Fixture("tar.bz2", "x.tar.bz2", bz2.compress(plain))
    yield Fixture("tar.xz", "x.tar.xz", lzma.compress(plain))
    yield Fixture("gzip", "x.png.gz", gzip.compress(films["a/0.png"], mtime=0))
    yield Fixture("zip", "x.zip", _zip(films))
    yield Fixture("zip", "stored.zip", _zip(films, zipfile.ZIP_STORED))
    yield Fixture("zip", "bzip2.zip", _zip(films, zipfile.ZIP_BZIP2))
    yield Fixture("zip", "lzma.zip", _zip(films, zipfile.ZIP_LZMA))
    yield Fixture("nested", "zips.tar", tar({"in.zip": _zip(films), "b.png": films["a/0.png"]}))
    yield Fixture("nested", "tars.zip", _zip({"in.tar.gz": gzip.compress(plain, mtime=0)}))
    columns = {"path": list(films), "image": list(films.values())}
    yield Fixture("parquet", "x.parquet", _parquet(pa.table(columns)))
    yield Fixture("parquet", "zstd.parquet", _parquet(pa.table(columns), compression="zstd"))
    structs = [{"bytes": data, "path": name} for name, data in films.items()]
    yield Fixture(
        "parquet",
        "struct.parquet",
        _parquet(pa.table({"image": structs}), row_group_size=2, use_dictionary=False),
    )


@cache
def own_fixtures() -> tuple[Fixture, ...]:
    return (*_pictures(), *_dicom_objects(), *_containers())


@cache
def all_fixtures() -> tuple[Fixture, ...]:
    """Own ones twice: pydicom's many objects are not to crowd them out."""
    return (*own_fixtures(), *own_fixtures(), *_foreign_objects())


# ------------------------------------------------------------------------------------ mutations

Random = random.Random
Mutation = Callable[[Random, Fixture, tuple[Fixture, ...]], bytes]


def _place(rng: Random, data: bytes) -> int:
    """Anywhere; every other time near the front, where headers are."""
    return rng.randrange(min(len(data), 512 if rng.randrange(2) else len(data)) or 1)


def _part(rng: Random, data: bytes) -> tuple[int, int]:
    start = _place(rng, data)
    return start, start + 1 + rng.randrange(max(1, min(len(data) - start, 4096)))


def truncated(rng: Random, fixture: Fixture, _: tuple[Fixture, ...]) -> bytes:
    return fixture.data[: rng.randrange(len(fixture.data))]


def flipped(rng: Random, fixture: Fixture, _: tuple[Fixture, ...]) -> bytes:
    data = bytearray(fixture.data)
    for _number in range(2 ** rng.randrange(7)):
        data[_place(rng, data)] ^= 1 << rng.randrange(8) if rng.randrange(2) else rng.randrange(256)
    return bytes(data)


def spliced(rng: Random, fixture: Fixture, fixtures: tuple[Fixture, ...]) -> bytes:
    """The head of one and the tail of another."""
    other = rng.choice(fixtures).data
    return fixture.data[: _place(rng, fixture.data)] + other[_place(rng, other) :]


def lengthened(rng: Random, fixture: Fixture, _: tuple[Fixture, ...]) -> bytes:
    """Fields of 2, 4 and 8 bytes set to what a length must never be."""
    data = bytearray(fixture.data)
    for _number in range(1 + rng.randrange(4)):
        size, place = rng.choice((2, 4, 8)), _place(rng, data)
        value = rng.choice((b"\0" * 8, b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\x80" + b"\0" * 7))
        field_ = value[:size] if rng.randrange(2) else value[:size][::-1]
        data[place : place + size] = field_[: len(data) - place]
    return bytes(data)


def deleted(rng: Random, fixture: Fixture, _: tuple[Fixture, ...]) -> bytes:
    start, end = _part(rng, fixture.data)
    return fixture.data[:start] + fixture.data[end:]


def duplicated(rng: Random, fixture: Fixture, _: tuple[Fixture, ...]) -> bytes:
    start, end = _part(rng, fixture.data)
    return (
        fixture.data[:end] + fixture.data[start:end] * (1 + rng.randrange(8)) + fixture.data[end:]
    )


def zeroed(rng: Random, fixture: Fixture, _: tuple[Fixture, ...]) -> bytes:
    start, end = _part(rng, fixture.data)
    end = min(end, len(fixture.data))
    return fixture.data[:start] + bytes(end - start) + fixture.data[end:]


_GIANT_SIDES = (0, 1, 9_999, 30_000, 50_000, 65_535)
_GIANT_NUMBERS = (*_GIANT_SIDES, 1 << 20, 2**31 - 1, 2**31, 2**32 - 1)


def giant(rng: Random, fixture: Fixture, fixtures: tuple[Fixture, ...]) -> bytes:
    """What the header declares, made huge (or nothing), and the rest left valid."""
    try:
        match fixture.kind:
            case "png":
                return _giant_png(rng, fixture.data)
            case "jpeg":
                return _giant_jpeg(rng, fixture.data)
            case "tiff":
                return _giant_tiff(rng, fixture.data)
            case "jpeg2000":
                return _giant_jpeg2000(rng, fixture.data)
            case "bmp":
                return _giant_bmp(rng, fixture.data)
            case "dicom":
                return _giant_dicom(rng, fixture.data)
            case "tar":
                return _giant_tar(rng, fixture.data)
            case "zip":
                return _giant_zip(rng, fixture.data)
    except Exception:
        # A foreign object that pydicom reads and cannot write: the blunt way, then.
        pass
    return lengthened(rng, fixture, fixtures)


def sized_png(data: bytes, width: int, height: int) -> bytes:
    header = data[12:16] + struct.pack(">2I", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def sized_jpeg(data: bytes, width: int, height: int) -> bytes:
    at = next(
        at for at in range(2, len(data)) if data[at] == 0xFF and data[at + 1] in (0xC0, 0xC1, 0xC2)
    )
    return data[: at + 5] + struct.pack(">2H", height, width) + data[at + 9 :]


def sized_jpeg2000(data: bytes, width: int, height: int) -> bytes:
    at = data.index(b"\xff\x4f\xff\x51")
    size = struct.pack(">2I", width, height)
    boxed = data.find(b"ihdr", 0, at)
    if boxed >= 0:
        data = data[: boxed + 4] + struct.pack(">2I", height, width) + data[boxed + 12 :]
    # One tile of that size.
    return data[: at + 8] + size + data[at + 16 : at + 24] + size + data[at + 32 :]


def with_tiff_tags(data: bytes, values: dict[int, int]) -> bytes:
    """Tags of the first directory set to a value, as LONG."""
    changed, order = bytearray(data), "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, at)
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        (tag,) = struct.unpack_from(f"{order}H", data, entry)
        if tag in values:
            struct.pack_into(f"{order}H2I", changed, entry + 2, 4, 1, values[tag])
    return bytes(changed)


def with_elements(data: bytes, **elements: Any) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def _giant_png(rng: Random, data: bytes) -> bytes:
    data = sized_png(data, rng.choice(_GIANT_NUMBERS), rng.choice(_GIANT_NUMBERS))
    if rng.randrange(3):
        return data
    header = bytearray(data[12:29])
    header[12 + rng.randrange(5)] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
    return data[:12] + bytes(header) + struct.pack(">I", zlib.crc32(header)) + data[33:]


def _giant_jpeg(rng: Random, data: bytes) -> bytes:
    return sized_jpeg(data, rng.choice(_GIANT_SIDES), rng.choice(_GIANT_SIDES))


def _giant_tiff(rng: Random, data: bytes) -> bytes:
    # Sizes, bits, compression, strips, samples, rows a strip, lengths, planes, tiles.
    tags = rng.sample((256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 322, 323, 339), 3)
    return with_tiff_tags(data, {tag: rng.choice(_GIANT_NUMBERS) for tag in tags})


def _giant_jpeg2000(rng: Random, data: bytes) -> bytes:
    if rng.randrange(2):
        return sized_jpeg2000(data, rng.choice(_GIANT_NUMBERS), rng.choice(_GIANT_NUMBERS))
    at = data.index(b"\xff\x4f\xff\x51") + 8 + 4 * rng.randrange(8)
    return data[:at] + struct.pack(">I", rng.choice(_GIANT_NUMBERS)) + data[at + 4 :]


def _giant_bmp(rng: Random, data: bytes) -> bytes:
    size = struct.pack("<2I", rng.choice(_GIANT_NUMBERS), rng.choice(_GIANT_NUMBERS))
    return data[:18] + size + data[26:]


_SYNTAXES = [uid.encode() for uid in (
    "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2",
    "1.2.840.10008.1.2.5", *(f"1.2.840.10008.1.2.4.{number}" for number in (
        50, 51, 57, 70, 80, 81, 90, 91, 92, 100, 102, 106, 110, 201, 202, 203)),
)]  # fmt: skip


def _giant_dicom(rng: Random, data: bytes) -> bytes:
    item = b"\xfe\xff\x00\xe0"
    choice = rng.randrange(5)
    if choice == 4 and item in data:
        return _with_a_damaged_frame(rng, data)
    if choice == 0 and item in data:
        places = [at for at in range(len(data)) if data.startswith(item, at)]
        at = rng.choice(places) + 4
        length = struct.pack("<I", rng.choice((*_GIANT_NUMBERS, 2, 4, 1000)))
        return data[:at] + length + data[at + 4 :]
    if choice == 1:
        # One encoding under the name of another, in the same place.
        name = b"\x02\x00\x10\x00UI"
        at = data.index(name) + 6
        (length,) = struct.unpack_from("<H", data, at)
        syntax = rng.choice([known for known in _SYNTAXES if len(known) <= length])
        return data[: at + 2] + syntax.ljust(length, b"\0") + data[at + 2 + length :]
    values = {
        "Rows": _GIANT_SIDES, "Columns": _GIANT_SIDES, "NumberOfFrames": _GIANT_NUMBERS,
        "BitsAllocated": (0, 1, 8, 12, 16, 32, 64), "BitsStored": (0, 1, 7, 12, 16, 17, 32, 65535),
        "SamplesPerPixel": (0, 1, 3, 4, 65535), "PixelRepresentation": (0, 1, 2),
        "PlanarConfiguration": (0, 1, 2), "WindowWidth": (0, 1, 1e300), "RescaleSlope": (0, 1e300),
        "PhotometricInterpretation": ("RGB", "YBR_FULL_422", "PALETTE COLOR", "MONOCHROME1"),
        "PixelPaddingValue": (0, 65535), "PixelAspectRatio": ([1, 9], [0, 0], [99999999, 1]),
    }  # fmt: skip
    keywords = rng.sample(sorted(values), 1 + rng.randrange(3))
    return with_elements(data, **{keyword: rng.choice(values[keyword]) for keyword in keywords})


def _with_a_damaged_frame(rng: Random, data: bytes) -> bytes:
    """Coded pixels cut or damaged, inside an object that is whole."""
    dataset = pydicom.dcmread(io.BytesIO(data))
    frame = get_frame(dataset.PixelData, 0, number_of_frames=int(dataset.get("NumberOfFrames", 1)))
    fixture = Fixture("frame", "frame", frame)
    damaged = rng.choice((truncated, truncated, flipped, lengthened, deleted))(rng, fixture, ())
    return with_elements(data, PixelData=encapsulate([damaged or b"\0\0"]), NumberOfFrames=1)


def _giant_tar(rng: Random, data: bytes) -> bytes:
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(headers)
    header = bytearray(data[at : at + 512])
    if rng.randrange(2):
        number = rng.choice((*_GIANT_NUMBERS, 8**11 - 1, 2**63 - 1, 2**64 - 1))
        octal = b"%011o\0" % number if number < 8**11 else b"\x80" + number.to_bytes(11, "big")
        header[124:136] = octal
    else:
        header[156:157] = rng.choice([bytes([kind]) for kind in b"0123456KLSVDxgX"])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


def _giant_zip(rng: Random, data: bytes) -> bytes:
    signature = rng.choice((b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"))
    places = [at for at in range(len(data)) if data.startswith(signature, at)]
    offset, size = rng.choice({
        b"PK\x01\x02": ((10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (42, 4)),
        b"PK\x03\x04": ((6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
        b"PK\x05\x06": ((8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
    }[signature])  # fmt: skip
    at = rng.choice(places) + offset
    number = rng.choice(_GIANT_NUMBERS) % (1 << 8 * size)
    return data[:at] + number.to_bytes(size, "little") + data[at + size :]


def stacked(rng: Random, fixture: Fixture, fixtures: tuple[Fixture, ...]) -> bytes:
    for _number in range(2 + rng.randrange(2)):
        if fixture.data:
            data = rng.choice(BLUNT)(rng, fixture, fixtures)
            fixture = Fixture(fixture.kind, fixture.name, data)
    return fixture.data


BLUNT: tuple[Mutation, ...] = (
    truncated, flipped, spliced, lengthened, deleted, duplicated, zeroed,
)  # fmt: skip
MUTATIONS: tuple[Mutation, ...] = (*BLUNT, giant, giant, stacked)


# ---------------------------------------------------------------------------------------- bombs

_MIB = 1 << 20


def _zeros(size: int, wbits: int) -> bytes:
    """`size` zeros, deflated: raw (-15), with a header of zlib (15) or gzip (31)."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(_MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    # After a full flush the same zeros become the same bytes again.
    rest = packer.compress(bytes(size % _MIB)) + packer.flush()
    raw = block * (size // _MIB) + rest
    if wbits == -15:
        return raw
    if wbits == 15:
        return b"\x78\xda" + raw + struct.pack(">2H", size % 65_521, 1)
    checksum = 0
    for _ in range(size // _MIB):
        checksum = zlib.crc32(bytes(_MIB), checksum)
    checksum = zlib.crc32(bytes(size % _MIB), checksum)
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
    """A zip with one member, packed already, that states this size."""
    data = bytearray(_zip({"a.png": packed}, zipfile.ZIP_STORED))
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
    """One that states a size much smaller than what it unpacks to."""
    data = _zip({"a.png": bytes(size)}, method)
    start, end = 30 + len("a.png"), data.index(b"PK\x01\x02")
    return _zip_around(data[start:end], method, 100_000)


def _zip_of_overlapping(count: int = 1000) -> bytes:
    """A kernel of zeros that every member shares (D. Fifield, WOOT 2019)."""
    kernel = _zip({"a": bytes(16 * _MIB)})
    start, end = kernel.index(b"PK\x01\x02"), kernel.index(b"PK\x05\x06")
    entry = kernel[start:end]
    finish = struct.pack(
        "<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(entry) * count, start, 0
    )
    return kernel[:start] + entry * count + finish


def _nested_zips(depth: int = 4) -> bytes:
    data = _zip({"0.bin": bytes(64 * _MIB)})
    for level in range(depth):
        data = _zip({f"{level}-{number}.zip": data for number in range(8)})
    return data


def _tiff_bomb(compression: str, side: int) -> bytes:
    data = encoded(np.zeros((512, 512), np.uint8), "TIFF", compression=compression)
    return with_tiff_tags(data, {256: side, 257: side, 278: side})


def _tiff_pages(count: int, side: int) -> bytes:
    """Pages that all share the strip of the first."""
    data = bytearray(encoded(np.zeros((side, side), np.uint8), "TIFF", compression="tiff_lzw"))
    (at,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, at)
    directory = bytes(data[at : at + 2 + 12 * entries])
    data += b"\0" * (len(data) % 2)
    for number in range(count - 1):
        struct.pack_into("<I", data, at + len(directory), len(data))
        at = len(data)
        data += directory + bytes(4)
        assert number < count
    return bytes(data)


def _tiff_in_a_circle() -> bytes:
    data = bytearray(encoded(grey_film(), "TIFF"))
    (at,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, at)
    struct.pack_into("<I", data, at + 2 + 12 * entries, at)
    return bytes(data)


def _jpeg_of_scans(count: int, side: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again: each one walks all blocks."""
    data = encoded(np.zeros((side, side), np.uint8), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def _encapsulated(frame: bytes, syntax: UID, side: int, frames: int, **elements: Any) -> bytes:
    dataset = _object(
        np.zeros((2, 2)), **{"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7} | elements
    )
    dataset.Rows = dataset.Columns = side
    dataset.NumberOfFrames = frames
    dataset.PixelData = encapsulate([frame] * frames)
    return _written(dataset, syntax)


def _rle_zeros(size: int) -> bytes:
    runs = b"\x81\0" * (size // 128)
    return struct.pack("<16I", 1, 64, *[0] * 14) + runs


def own(name: str) -> bytes:
    return next(fixture.data for fixture in own_fixtures() if fixture.name == name)


def _jpeg_ls_cut() -> bytes:
    """Its header, and a part of its pixels: of a whole DICOM object."""
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
    data = _written(_object(grey_film().astype(np.uint16)), DeflatedExplicitVRLittleEndian)
    meta = 132 + 12 + struct.unpack_from("<I", data, 140)[0]
    return data[:meta] + _zeros(size, -15)


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "png of zeros, 50,000 x 50,000": ("png", lambda: _png_of_zeros(50_000)),
    "png of one bit, 50,000 x 50,000": ("png", lambda: _png_of_zeros(50_000, 1)),
    "png of zeros, 9,999 x 9,999": ("png", lambda: _png_of_zeros(9_999)),
    "png of colour, 9,999 x 9,999": ("png", lambda: _png_of_zeros(9_999, 8, 6)),
    "png whose pixels do not end": (
        "png", lambda: _png(120, 120, 8, 0, pixels=_zeros(512 * _MIB, 15)),
    ),
    "png with a text bomb": (
        "png", lambda: _png_with(b"zTXt", b"a\0\0" + _zeros(512 * _MIB, 15)),
    ),
    "png with a profile bomb": (
        "png", lambda: _png_with(b"iCCP", b"a\0\0" + _zeros(512 * _MIB, 15)),
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
    "gzip of zeros": ("gz", lambda: _zeros(1024 * _MIB, 31)),
    "gzip in gzip": ("gz", lambda: gzip.compress(_zeros(1024 * _MIB, 31), mtime=0)),
    "gzip of many streams": ("gz", lambda: gzip.compress(b"", mtime=0) * 100_000),
    "zstd of zeros": ("zst", lambda: _zstd(bytes(512 * _MIB))),
    # Streams behind one another, which unpack as one.
    "xz of zeros": ("xz", lambda: lzma.compress(bytes(32 * _MIB), preset=0) * 12),
    "bzip2 of zeros": ("bz2", lambda: bz2.compress(bytes(32 * _MIB), 9) * 12),
    "tar of a bomb": ("tar.gz", lambda: gzip.compress(tar({"a.gz": _zeros(1024 * _MIB, 31)}))),
    "tar of a hole": ("tar", _sparse_tar),
    "zip of zeros": ("zip", lambda: _zip_of_zeros(1024 * _MIB)),
    "zip that hides zeros": ("zip", lambda: _zip_that_hides(64 * _MIB, zipfile.ZIP_DEFLATED)),
    "zip that hides bzip2": ("zip", lambda: _zip_that_hides(64 * _MIB, zipfile.ZIP_BZIP2)),
    "zip that hides lzma": ("zip", lambda: _zip_that_hides(16 * _MIB, zipfile.ZIP_LZMA)),
    "zip in zip in zip": ("zip", _nested_zips),
    "zip of overlapping members": ("zip", _zip_of_overlapping),
    "dicom that inflates to 1 GiB": ("dcm", lambda: _deflated_dicom(1024 * _MIB)),
    "dicom of 65,535 x 65,535": (
        "dcm",
        lambda: with_elements(
            _written(_object(grey_film()), ExplicitVRLittleEndian), Rows=65_535, Columns=65_535
        ),
    ),
    "dicom of 2,147,483,647 frames": (
        "dcm",
        lambda: with_elements(
            _written(_object(grey_film()), ExplicitVRLittleEndian), NumberOfFrames=2**31 - 1
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
    "dicom of nothing but zeros": ("dcm", lambda: bytes(128) + b"DICM" + bytes(64 * _MIB)),
    "dicom that inflates to zeros": ("dcm", lambda: _deflated_dicom(500 * _MIB)),
    "dicom of a jpeg-ls that does not end": (
        "dcm",
        lambda: with_elements(own("jpeg-ls.dcm"), PixelData=encapsulate([_jpeg_ls_cut()])),
    ),
    "dicom of a jpeg of 4,000 scans": (
        "dcm",
        lambda: _encapsulated(_jpeg_of_scans(4_000, 4_000), JPEGBaseline8Bit, 4_000, 1),
    ),
}  # fmt: skip
"""What is small and declares, or becomes, something huge: suffix, and how it is made."""


@cache
def bomb(name: str) -> Fixture:
    suffix, make = BOMBS[name]
    return Fixture("bomb", f"x.{suffix}", make())


# ---------------------------------------------------------------------------------------- inputs


def mutated(rng: Random, fixtures: tuple[Fixture, ...]) -> Input:
    """A fixture, damaged; now and then one that is as it was, or has another's name."""
    fixture = rng.choice(fixtures)
    mutation = rng.choice(MUTATIONS)
    whole = rng.randrange(100) == 0
    data = fixture.data if whole else mutation(rng, fixture, fixtures)
    suffix = rng.choice(fixtures).suffix if rng.randrange(20) == 0 else fixture.suffix
    return Input(
        fixture.kind, "none" if whole else mutation.__name__, f"{fixture.name}~{suffix}", data
    )


def input_of(seed: int, number: int) -> Input:
    """The input of this number: nothing else decides it."""
    rng = Random(f"{seed}/{number}")
    names = sorted(BOMBS)
    if number < len(names):
        # Every bomb once as it is; later ones are damaged, too.
        found = bomb(names[number])
        return Input("bomb", names[number], found.name, found.data)
    if rng.randrange(150) == 0:
        name = rng.choice(names)
        data = rng.choice((flipped, lengthened, truncated))(rng, bomb(name), all_fixtures())
        return Input("bomb", f"{name}, damaged", bomb(name).name, data)
    return mutated(rng, all_fixtures())


# -------------------------------------------------------------------------------------- conditions


def rows_of(folder: Path, objects: pa.Table, settings: ReadSettings = SETTINGS) -> list[dict]:
    """What a Ray task makes of these objects. Raises `AssertionError` for another schema."""
    store = take_inventory(str(folder)).store
    rows = []
    for table in read_images(store, objects, settings):
        assert table.schema == READ_SCHEMA
        rows += table.to_pylist()
    return rows


def broken_conditions(rows: list[dict], settings: ReadSettings = SETTINGS) -> list[str]:
    """What is wrong with the rows of one object; empty where nothing is."""
    images = [row for row in rows if row["shard_rows"] is None]
    found = [] if images else ["no row"]
    for row in images:
        code, status = row["error_code"], row["status"]
        if status == Status.OK:
            if (
                code is not None
                or len(row["pixels"] or b"") != settings.preprocessing.image_size**2
            ):
                found.append("ok, with a code or without its pixels")
        elif code not in set(ErrorCode) or row["pixels"] is not None:
            found.append(f"{status} with code {code}")
        elif code in _IMPOSSIBLE:
            found.append(f"{code}: {row['error_message']}")
        elif code != ErrorCode.NOT_AN_IMAGE:
            expected = Status.REJECTED if code in REJECTING else Status.FAILED
            if status != expected:
                found.append(f"{code} is {status}")
    ends = [row["shard_rows"] for row in rows if row["shard_rows"] is not None]
    several = len(images) > 1 or any(row["reading"] for row in images)
    if ends != ([len(images)] if several else []):
        found.append(f"{len(images)} rows are closed by {ends}")
    elif several and (rows[-1]["shard_rows"] is None or len({row["reading"] for row in rows}) != 1):
        found.append("the rows of one pass do not belong together")
    return found


def _outcome(rows: list[dict]) -> str:
    codes = [row["error_code"] for row in rows if row["shard_rows"] is None]
    return next((code for code in codes if code), "ok")


# -------------------------------------------------------------------------------------- measuring


@dataclass
class Outcome:
    """What became of one input."""

    number: int
    kind: str
    mutation: str
    name: str
    size_bytes: int
    outcome: str = ""
    rows: int = 0
    seconds: float = 0.0
    """By the clock."""
    cpu_seconds: float = 0.0
    """Of both processes: what it would take on a machine with nothing else to do."""
    own_bytes: int = 0
    """Peak of the process that reads."""
    decoder_bytes: int = 0
    broken: list[str] = field(default_factory=list)


def resident_bytes(pid: int | str = "self", what: str = "VmRSS") -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) * 1024
    return 0


def _peak_bytes(pid: int | str) -> int:
    return resident_bytes(pid, "VmHWM")


def _forget_peak(pid: int | str) -> None:
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def _decoder_pids() -> list[int]:
    return [found._process.pid for found in decoder._idle.values() if found._process is not None]


def _cpu_seconds(pids: list[int]) -> float:
    """Of this process, its children that have ended, and those running."""
    used = sum(os.times()[:4])
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            used += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def _read_alone(folder: Path, objects: pa.Table, outcome: Outcome) -> list[dict]:
    before = _decoder_pids()
    for pid in ("self", *before):
        _forget_peak(pid)
    started, cpu_started = time.monotonic(), _cpu_seconds(before)
    rows = rows_of(folder, objects)
    outcome.seconds = time.monotonic() - started
    outcome.cpu_seconds = _cpu_seconds(_decoder_pids()) - cpu_started
    outcome.own_bytes = _peak_bytes("self")
    after = _decoder_pids()
    outcome.decoder_bytes = max(map(_peak_bytes, after), default=0)
    if before and before != after:
        # That of a process that has died is known only to its parent.
        died = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        outcome.decoder_bytes = max(outcome.decoder_bytes, died)
    outcome.outcome = _outcome(rows)
    outcome.rows = sum(row["shard_rows"] is None for row in rows)
    outcome.broken += broken_conditions(rows)
    timed_out = any(row["error_code"] == ErrorCode.DECODER_TIMEOUT for row in rows)
    if outcome.cpu_seconds > MAX_SECONDS or timed_out:
        outcome.broken.append(f"took {outcome.seconds:.1f} s")
    if max(outcome.own_bytes, outcome.decoder_bytes) > MAX_MEMORY_BYTES:
        outcome.broken.append("took more than 2 GiB")
    return rows


def _work(connection: Connection) -> None:
    """Read what lies in the folders that come in, each object alone and then all as one task has
    them: the rows must be the same, whatever the neighbours do to the decoder."""
    faulthandler.enable()
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(EOFError):
        while True:
            folder, outcomes = connection.recv()
            objects = take_inventory(str(folder)).objects
            alone = []
            for index, outcome in enumerate(outcomes):
                connection.send(outcome.number)
                try:
                    alone.append(_read_alone(folder, objects.slice(index, 1), outcome))
                except Exception:
                    outcome.broken.append(f"raised {traceback.format_exc()}")
                    alone.append([])
                connection.send(outcome)
            connection.send(range(outcomes[0].number, outcomes[-1].number + 1))
            together: dict[str, list[dict]] = {outcome.name: [] for outcome in outcomes}
            for row in rows_of(folder, objects):
                together[row["image"]].append(row)
            for outcome, rows in zip(outcomes, alone, strict=True):
                if not outcome.broken and _without_reading(rows) != _without_reading(
                    together[outcome.name]
                ):
                    outcome.broken.append("other rows among others than alone")
                    connection.send(outcome)
            connection.send(None)


def _without_reading(rows: list[dict]) -> list[dict]:
    return [row | {"reading": None} for row in rows]


class _Reader:
    """The reading process, and another in its place where one has died. Inputs are made outside it:
    its memory is to be that of reading."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._worker: Any = None

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def read(self, folder: Path, outcomes: list[Outcome]) -> Iterator[Outcome]:
        """The outcomes filled in; one comes again where the whole batch tells more of it."""
        while outcomes:
            if self._worker is None:
                self._start()
            self._ours.send((folder, outcomes))
            at: int | range = outcomes[0].number
            try:
                while True:
                    patience = 1 if isinstance(at, int) else 10
                    if not self._ours.poll(_HANGS_SECONDS * patience):
                        raise TimeoutError
                    found = self._ours.recv()
                    if found is None:
                        return
                    if isinstance(found, Outcome):
                        yield found
                    else:
                        at = found
            except (EOFError, OSError, TimeoutError) as error:
                exit_code = self._end()
                told = "hangs" if isinstance(error, TimeoutError) else f"died ({exit_code})"
                lost = at if isinstance(at, int) else at.stop - 1
                (guilty,) = (outcome for outcome in outcomes if outcome.number == lost)
                guilty.outcome = "ended the process"
                what = "" if isinstance(at, int) else f" while {at} were read together"
                guilty.broken.append(f"the reading process {told}{what}")
                yield guilty
                for outcome in outcomes:
                    if outcome.number <= lost:
                        (folder / outcome.name).unlink()
                outcomes = [outcome for outcome in outcomes if outcome.number > lost]

    def _start(self) -> None:
        self._ours, theirs = self._context.Pipe()
        self._worker = self._context.Process(target=_work, args=(theirs,))
        self._worker.start()
        theirs.close()

    def _end(self) -> int | None:
        if self._worker is None:
            return None
        self._ours.close()
        self._worker.join(2)
        self._worker.kill()
        self._worker.join()
        exit_code: int | None = self._worker.exitcode
        self._worker = None
        return exit_code


def _outcomes(seed: int, numbers: range, scratch: Path) -> Iterator[Outcome]:
    with _Reader() as reader:
        for first in range(numbers.start, numbers.stop, _BATCH):
            folder = scratch / f"{first:06d}"
            folder.mkdir(parents=True)
            outcomes = []
            for number in range(first, min(first + _BATCH, numbers.stop)):
                made = input_of(seed, number)
                name = f"{number:06d}-{made.name}"
                (folder / name).write_bytes(made.data)
                outcomes.append(Outcome(number, made.kind, made.mutation, name, len(made.data)))
            yield from reader.read(folder, outcomes)
            shutil.rmtree(folder)


# --------------------------------------------------------------------------------------- reporting


def _is_kept(outcome: Outcome) -> bool:
    crashed = outcome.outcome in (ErrorCode.DECODER_CRASH, ErrorCode.DECODER_TIMEOUT)
    return bool(outcome.broken or crashed or outcome.cpu_seconds > _SLOW_SECONDS)


def _table(outcomes: list[Outcome]) -> Iterator[str]:
    counts = Counter((outcome.kind, outcome.outcome) for outcome in outcomes)
    kinds = sorted({kind for kind, _ in counts})
    yield "| outcome | " + " | ".join(kinds) + " | all |"
    yield "|---|" + "---:|" * (len(kinds) + 1)
    for code in sorted({code for _, code in counts}):
        row = [counts[kind, code] for kind in kinds]
        yield f"| {code} | " + " | ".join(str(count or "") for count in row) + f" | {sum(row)} |"
    totals = [sum(outcome.kind == kind for outcome in outcomes) for kind in kinds]
    yield "| all | " + " | ".join(map(str, totals)) + f" | {len(outcomes)} |"


def _listed(title: str, outcomes: list[Outcome]) -> Iterator[str]:
    yield f"\n{title}"
    for found in outcomes:
        yield (
            f"  {found.number}: {found.seconds:.2f} s ({found.cpu_seconds:.2f} of CPU), "
            f"reader {found.own_bytes // _MIB} MiB, decoder {found.decoder_bytes // _MIB} MiB, "
            f"{found.size_bytes} bytes, {found.kind}, "
            f"{found.mutation}, {found.name}: {found.outcome} ({found.rows} rows)"
            + "".join(f"\n      {line}" for line in found.broken)
        )


def report(outcomes: list[Outcome]) -> str:
    crashed = [found for found in outcomes if found.outcome == ErrorCode.DECODER_CRASH]
    timed_out = [found for found in outcomes if found.outcome == ErrorCode.DECODER_TIMEOUT]

    def top(key: Callable[[Outcome], float]) -> list[Outcome]:
        return sorted(outcomes, key=key, reverse=True)[:10]

    return "\n".join(
        (
            *_table(outcomes),
            f"\n{sum(found.rows for found in outcomes)} rows",
            *_listed("Slowest", top(lambda found: found.cpu_seconds)),
            *_listed("Most memory of the reading process", top(lambda found: found.own_bytes)),
            *_listed("Most memory of the decoder", top(lambda found: found.decoder_bytes)),
            *_listed(f"Decoder crashed: {len(crashed)}", crashed[:50]),
            *_listed(f"Decoder timed out: {len(timed_out)}", timed_out[:50]),
            *_listed("Broken conditions", [found for found in outcomes if found.broken]),
        )
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where odd inputs are kept")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fixtures = all_fixtures()
    digest = hashlib.sha256(b"".join(fixture.data for fixture in fixtures)).hexdigest()
    print(
        f"seed {options.seed}, {len(set(fixtures))} fixtures with digest {digest[:16]}", flush=True
    )
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))
    (folder / "kept").mkdir(parents=True, exist_ok=True)
    found: dict[int, Outcome] = {}
    numbers = range(options.first, options.first + options.inputs)
    with (
        tempfile.TemporaryDirectory(dir=folder) as scratch,
        Progress("Fuzzing", total=len(numbers), unit="inputs") as progress,
    ):
        for outcome in _outcomes(options.seed, numbers, Path(scratch)):
            progress.advance(outcome.number not in found, outcome.outcome)
            found[outcome.number] = outcome
            if _is_kept(outcome):
                name = f"{outcome.number:06d}-{outcome.outcome.replace(' ', '-')}"
                suffix = Path(outcome.name).suffix
                (folder / "kept" / f"{name}{suffix}").write_bytes(
                    input_of(options.seed, outcome.number).data
                )
                logging.info("kept: %s", "\n".join(_listed("", [outcome])))
    print(report(list(found.values())))
    print(f"\nkept inputs: {folder / 'kept'}")
    return int(any(outcome.broken for outcome in found.values()))


if __name__ == "__main__":
    sys.exit(main())
