"""The ways in which a valid file is damaged or made to lie."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pydicom
from pydicom.encaps import encapsulate, get_frame

from tests.fuzz.fixtures import Fixture

Random = random.Random
Mutation = Callable[[Random, Fixture, tuple[Fixture, ...]], bytes]


def _place(rng: Random, data: bytes) -> int:
    """A random place; every other time it is near the front, where headers are."""
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
    """Set fields of 2, 4 and 8 bytes to values that a length must never have."""
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
    """Make what the header declares huge (or nothing), and leave the rest valid."""
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
        # pydicom reads some foreign objects that it cannot write; they get the blunt way below.
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
    """Set tags of the first directory to a value, as LONG."""
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
        # Name another encoding than the pixels have, in the same place.
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
    """Cut or damage the encoded pixels inside an object that is otherwise whole."""
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
