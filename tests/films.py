"""Small films that tests make for themselves."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from lungopacity.errors import ImageError
from lungopacity.radiograph import DecodeLimits, Radiograph, decode_radiographs


def grey_film(seed: int = 0, height: int = 120, width: int = 100) -> npt.NDArray[np.uint8]:
    """(height, width) uint8, smooth enough for JPEG to preserve, with a bright spine. It raises no
    quality flag."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 120, (6, 7), dtype=np.uint8)
    coarse[:, 3] += 120
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def one_film(data: bytes, limits: DecodeLimits | None = None, **options: object) -> Radiograph:
    """The radiograph of a file that holds one. Raises `ImageError`."""
    (found,) = decode_radiographs(data, limits=limits or DecodeLimits(), **options)
    if isinstance(found, ImageError):
        raise found
    return found


def encoded(pixels: npt.NDArray[np.generic], image_format: str = "PNG", **options: object) -> bytes:
    return saved(Image.fromarray(pixels), image_format, **options)


def saved(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def tiff_of_pages(pages: Sequence[npt.NDArray[np.uint8]], **options: object) -> bytes:
    """A TIFF of several pages."""
    first, *others = map(Image.fromarray, pages)
    return saved(first, "TIFF", save_all=True, append_images=others, **options)


def dicom(stored: npt.NDArray[np.uint16], **elements: object) -> bytes:
    """An uncompressed DX object with these stored values (12 bits) and elements by keyword."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.Modality = "DX"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.PixelData = stored.astype("<u2").tobytes()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def tar(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
