"""Valid files of every kind, to be damaged."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pyarrow as pa
import pydicom
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from tests.archive.making import write_parquet
from tests.films import dicom, encoded, grey_film, saved, tar, tiff_of_pages
from tests.real_data import DICOM_FOLDER

IMAGE_KINDS = ("png", "jpeg", "tiff", "jpeg2000", "bmp", "dicom")
_LARGEST_FIXTURE = 1 << 20


@dataclass(frozen=True)
class Fixture:
    """A valid file, to be damaged."""

    kind: str
    name: str
    """With the usual suffix of such a file."""
    data: bytes = field(repr=False)

    @property
    def suffix(self) -> str:
        return "".join(Path(self.name).suffixes[-2:])


def _pictures() -> Iterator[Fixture]:
    grey = grey_film(1, 140, 110)
    # A tint too faint to see, because colour would be rejected.
    rgb = np.stack([grey, grey // 16 * 15 + 8, grey // 16 * 15], axis=-1)
    deep = grey.astype(np.uint16) * 257
    picture = Image.fromarray(grey)

    turned = Image.Exif()
    turned[0x0112] = 6
    yield Fixture("png", "grey.png", encoded(grey, "PNG"))
    yield Fixture("png", "deep.png", encoded(deep, "PNG"))
    yield Fixture("png", "rgb.png", encoded(rgb, "PNG"))
    yield Fixture("png", "rgba.png", saved(Image.fromarray(rgb).convert("RGBA"), "PNG"))
    yield Fixture("png", "alpha.png", saved(picture.convert("LA"), "PNG"))
    yield Fixture("png", "palette.png", saved(picture.convert("P"), "PNG"))
    yield Fixture("png", "bits.png", saved(picture.convert("1"), "PNG"))
    yield Fixture("png", "profile.png", saved(picture, "PNG", icc_profile=bytes(range(256)) * 8))
    yield Fixture("jpeg", "grey.jpg", encoded(grey, "JPEG"))
    yield Fixture("jpeg", "grey-progressive.jpg", encoded(grey, "JPEG", progressive=True))
    yield Fixture("jpeg", "restarts.jpg", encoded(grey, "JPEG", restart_marker_rows=1))
    yield Fixture("jpeg", "rgb.jpg", encoded(rgb, "JPEG"))
    yield Fixture("jpeg", "progressive.jpg", encoded(rgb, "JPEG", progressive=True))
    yield Fixture("jpeg", "cmyk.jpg", saved(Image.fromarray(rgb).convert("CMYK"), "JPEG"))
    yield Fixture("jpeg", "turned.jpg", encoded(grey, "JPEG", exif=turned.tobytes()))
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd"):
        yield Fixture("tiff", f"{compression}.tif", encoded(grey, "TIFF", compression=compression))
    yield Fixture("tiff", "fax.tif", saved(picture.convert("1"), "TIFF", compression="group4"))
    yield Fixture("tiff", "deep.tif", encoded(deep, "TIFF", compression="tiff_lzw"))
    yield Fixture("tiff", "float.tif", encoded(grey.astype(np.float32), "TIFF"))
    yield Fixture("tiff", "rgb.tif", encoded(rgb, "TIFF", compression="tiff_adobe_deflate"))
    pages = [grey_film(seed, 100, 100) for seed in range(3)]
    yield Fixture("tiff", "pages.tif", tiff_of_pages(pages, compression="tiff_lzw"))
    yield Fixture("jpeg2000", "grey.jp2", encoded(grey, "JPEG2000"))
    yield Fixture("jpeg2000", "deep.jp2", encoded(deep, "JPEG2000"))
    yield Fixture("jpeg2000", "rgb.jp2", encoded(rgb, "JPEG2000", irreversible=True))
    yield Fixture(
        "jpeg2000", "tiles.j2k", encoded(grey, "JPEG2000", no_jp2=True, tile_size=(64, 64))
    )
    yield Fixture("bmp", "grey.bmp", encoded(grey, "BMP"))
    yield Fixture("bmp", "rgb.bmp", encoded(rgb, "BMP"))
    yield Fixture("bmp", "bits.bmp", saved(picture.convert("1"), "BMP"))


def _dicom_objects() -> Iterator[Fixture]:
    film = grey_film(2, 120, 100)
    stored = film.astype(np.uint16) * 16
    plain = stored_object(stored)
    yield Fixture("dicom", "explicit.dcm", written(plain, ExplicitVRLittleEndian))
    yield Fixture("dicom", "implicit.dcm", written(plain, ImplicitVRLittleEndian))
    yield Fixture("dicom", "big-endian.dcm", written(_big_endian(stored), ExplicitVRBigEndian))
    yield Fixture("dicom", "deflated.dcm", written(plain, DeflatedExplicitVRLittleEndian))
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    small = stored_object(film, **eight, PixelData=film.tobytes())
    for name, syntax, source in (
        ("rle", RLELossless, plain),
        ("rle-8", RLELossless, small),
        ("j2k", JPEG2000Lossless, plain),
        ("j2k-8", JPEG2000Lossless, small),
    ):
        dataset = pydicom.dcmread(io.BytesIO(written(source, ExplicitVRLittleEndian)))
        dataset.compress(syntax, generate_instance_uid=False)
        yield Fixture("dicom", f"{name}.dcm", written(dataset, syntax))
    for name, syntax, frame in (
        (
            "jpeg-lossless",
            JPEGLosslessSV1,
            imagecodecs.jpeg8_encode(stored, lossless=True, predictor=1, bitspersample=12),
        ),
        (
            "jpeg-extended",
            JPEGExtended12Bit,
            imagecodecs.jpeg8_encode(stored, level=95, bitspersample=12),
        ),
        ("htj2k", HTJ2KLossless, imagecodecs.htj2k_encode(stored, reversible=True)),
        ("jpeg-ls", JPEGLSLossless, imagecodecs.jpegls_encode(stored)),
    ):
        deep = stored_object(stored, PixelData=encapsulate([frame]))
        yield Fixture("dicom", f"{name}.dcm", written(deep, syntax))
    for name, syntax, frame in (
        ("jpeg", JPEGBaseline8Bit, encoded(film, "JPEG")),
        ("jpeg-ls-near", JPEGLSNearLossless, imagecodecs.jpegls_encode(film, level=2)),
    ):
        flat = stored_object(film, **eight, PixelData=encapsulate([frame]))
        yield Fixture("dicom", f"{name}.dcm", written(flat, syntax))
    films = [grey_film(seed, 100, 100).astype(np.uint16) * 16 for seed in range(3)]
    cine = stored_object(films[0], NumberOfFrames=3, PixelData=np.stack(films).tobytes())
    yield Fixture("dicom", "cine.dcm", written(cine, ExplicitVRLittleEndian))
    frames = [encoded(grey_film(seed, 100, 100), "JPEG") for seed in range(3)]
    cine = stored_object(films[0], **eight, NumberOfFrames=3, PixelData=encapsulate(frames))
    yield Fixture("dicom", "cine-jpeg.dcm", written(cine, JPEGBaseline8Bit))


def stored_object(stored: np.ndarray, **elements: Any) -> pydicom.Dataset:
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
    return stored_object(stored, PixelData=stored.astype(">u2").tobytes())


def written(dataset: pydicom.Dataset, syntax: UID) -> bytes:
    buffer = io.BytesIO()
    dataset.file_meta.TransferSyntaxUID = syntax
    list(dataset.iterall())  # unparsed, pydicom would write elements in their old encoding
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
    """DICOM files that pydicom ships, and those beside the checkout."""
    known = get_testdata_file("CT_small.dcm", download=False)
    folders = [(Path(known).parent, "pydicom"), (DICOM_FOLDER, "beside")]
    for folder, origin in folders:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            named = path.suffix == ".dcm" or path.name.startswith("DICOMDIR")
            if named and path.is_file() and path.stat().st_size <= _LARGEST_FIXTURE:
                name = f"{path.stem}.dcm" if path.suffix == ".dcm" else path.name
                yield Fixture("dicom", f"{origin}-{name}", path.read_bytes())


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()


def zstd_packed(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def _containers() -> Iterator[Fixture]:
    films = {f"a/{seed}.png": encoded(grey_film(seed, 100, 100)) for seed in range(3)}
    films["a/3.jpg"] = encoded(grey_film(3, 100, 100), "JPEG")
    films["notes.txt"] = b"hello"
    films["a/4.dcm"] = written(
        stored_object(grey_film(4, 100, 100).astype(np.uint16) * 16), ExplicitVRLittleEndian
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
    yield Fixture("tar.zst", "x.tar.zst", zstd_packed(plain))
    yield Fixture("tar.bz2", "x.tar.bz2", bz2.compress(plain))
    yield Fixture("tar.xz", "x.tar.xz", lzma.compress(plain))
    yield Fixture("gzip", "x.png.gz", gzip.compress(films["a/0.png"], mtime=0))
    yield Fixture("zip", "x.zip", zipped(films))
    yield Fixture("zip", "stored.zip", zipped(films, zipfile.ZIP_STORED))
    yield Fixture("zip", "bzip2.zip", zipped(films, zipfile.ZIP_BZIP2))
    yield Fixture("zip", "lzma.zip", zipped(films, zipfile.ZIP_LZMA))
    yield Fixture("nested", "zips.tar", tar({"in.zip": zipped(films), "b.png": films["a/0.png"]}))
    yield Fixture("nested", "tars.zip", zipped({"in.tar.gz": gzip.compress(plain, mtime=0)}))
    columns = {"path": list(films), "image": list(films.values())}
    yield Fixture("parquet", "x.parquet", write_parquet(pa.table(columns)))
    yield Fixture("parquet", "zstd.parquet", write_parquet(pa.table(columns), compression="zstd"))
    structs = [{"bytes": data, "path": name} for name, data in films.items()]
    yield Fixture(
        "parquet",
        "struct.parquet",
        write_parquet(pa.table({"image": structs}), row_group_size=2, use_dictionary=False),
    )


@cache
def own_fixtures() -> tuple[Fixture, ...]:
    return (*_pictures(), *_dicom_objects(), *_containers())


@cache
def all_fixtures() -> tuple[Fixture, ...]:
    """Our own fixtures twice, so that pydicom's many objects do not crowd them out."""
    return (*own_fixtures(), *own_fixtures(), *_foreign_objects())
