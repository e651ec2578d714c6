"""Makes containers of every kind that is read, with the libraries that people use."""

import bz2
import errno
import gzip
import io
import lzma
import random
import tarfile
import zipfile
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lungopacity.archive.containers import members
from lungopacity.errors import ImageError
from lungopacity.radiograph import DecodeLimits

LIMITS = DecodeLimits()

Files = list[tuple[str, bytes]]


def make_tar(files: Files, tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def make_zip(files: Files, method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            archive.writestr(info, data)
    return buffer.getvalue()


class Pipe(io.RawIOBase):
    """Makes zipfile write sizes after the data, as it does into a pipe."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data, /) -> int:
        self.data += data
        return len(data)


def make_streamed_zip(files: Files) -> bytes:
    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files:
            archive.writestr(deflated(name), data)
    return bytes(pipe.data)


def deflated(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def write_parquet(table: pa.Table, **options) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def make_hugging_face(files: Files) -> bytes:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": data, "path": name} for name, data in files], kind)
    return write_parquet(pa.table({"image": images, "label": pa.array([0] * len(files))}))


def make_flat_parquet(files: Files) -> bytes:
    columns = {
        "file_name": pa.array([name for name, _ in files], pa.string()),
        "jpg": pa.array([data for _, data in files], pa.large_binary()),
    }
    return write_parquet(pa.table(columns), row_group_size=2)


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstd,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}
TARS = {
    "tar": make_tar,
    "pax.tar": lambda files: make_tar(files, tarfile.PAX_FORMAT),
}
COMPRESSED_TARS = {
    f"tar.{suffix}": lambda files, compress=compress: compress(make_tar(files))
    for suffix, compress in COMPRESSIONS.items()
}
ZIPS = {
    "stored.zip": make_zip,
    "deflated.zip": lambda files: make_zip(files, zipfile.ZIP_DEFLATED),
    "bzip2.zip": lambda files: make_zip(files, zipfile.ZIP_BZIP2),
    "lzma.zip": lambda files: make_zip(files, zipfile.ZIP_LZMA),
    "streamed.zip": make_streamed_zip,
}
PARQUETS = {"hf.parquet": make_hugging_face, "flat.parquet": make_flat_parquet}
KINDS: dict[str, Callable[[Files], bytes]] = {**TARS, **COMPRESSED_TARS, **ZIPS, **PARQUETS}
every_kind = pytest.mark.parametrize("kind", KINDS)


def noise(seed: int, size: int = 1500) -> bytes:
    return b"film" + random.Random(seed).randbytes(size)


FILMS: Files = [(f"folder/ü {n}.v1.png", noise(n)) for n in range(5)]


class FailingDisk(io.BytesIO):
    """A file of which one range cannot be read."""

    def __init__(self, data: bytes, begin: int, end: int, number: int = errno.EIO) -> None:
        super().__init__(data)
        self.bad, self.number = range(begin, end), number

    def read(self, size: int | None = -1, /) -> bytes:
        start = self.tell()
        data = super().read(size)
        if start < self.bad.stop and start + len(data) > self.bad.start:
            raise OSError(self.number, "of a disk")
        return data

    read1 = read

    def readinto(self, buffer, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def walk(data: bytes | io.BytesIO, name: str = "x", limits: DecodeLimits = LIMITS, wanted=None):
    """Names and contents (for an error its code), and the code of the error that ended the walk."""
    rows = []
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    walking = members(file, name, limits, wanted)
    while True:
        try:
            index, member, content = next(walking)
        except StopIteration:
            return rows, None
        except ImageError as error:
            return rows, error.code
        assert index == len(rows)
        rows.append((member, content.code if isinstance(content, ImageError) else content))


def whole_from(kind: str, data: bytes) -> int:
    """The shortest length that loses nothing: tars are padded with zeros after their end mark."""
    return len(data.rstrip(b"\0")) // 512 * 512 + 1024 if kind in TARS else len(data)
