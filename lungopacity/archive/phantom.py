"""A phantom archive: synthetic chest films with labels and patients, for the demo and the tests.

It is as mixed as a real archive: PNG, JPEG and DICOM, loose and in tar shards, of both polarities.
No file name gives away a label, and the view is drawn independently of it.
"""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lungopacity.archive.phantom_film import WHITE, Film, Sex, View, draw_body, draw_film
from lungopacity.archive.phantom_opacity import OPACITY_KINDS, Box, OpacityKind
from lungopacity.errors import NOTICE
from lungopacity.radiograph import SYNTHETIC_MARK
from lungopacity.storage import Store

_COMMENT = f"{SYNTHETIC_MARK}. {NOTICE}"
_FORMATS = {"png": 0.5, "jpg": 0.3, "dcm": 0.2}
_MONOCHROME1_FRACTION = 0.33
_MAX_FILMS_PER_PATIENT = 3
# Patients get these in a cycle of ten, so that the shares are exact even for a few patients.
_SPLITS = (*(["train"] * 6), *(["validation"] * 2), *(["test"] * 2))
_UID_ROOT = "1.2.826.0.1.3680043.8.498."  # pydicom's root for test objects
_LABEL_COLUMNS = (
    "image", "label", "split", "patient_id", "view_position", "patient_sex", "patient_age_years",
)  # fmt: skip


@dataclass(frozen=True)
class PhantomSettings:
    """Settings of a phantom archive. The same settings give the same bytes."""

    images: int = 300
    """Number of films."""
    image_size: int = 256
    """Side of each square film, in pixels."""
    opacity_fraction: float = 0.45
    """Share of films with an opacity."""
    shard_fraction: float = 0.5
    """Share of films in tar shards; the others are loose."""
    images_per_shard: int = 60
    """Members of a full shard."""
    seed: int = 7
    """Seed of everything random."""

    def __post_init__(self) -> None:
        for name, least in (("images", 1), ("image_size", 64), ("images_per_shard", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, not {getattr(self, name)}")
        for name in ("opacity_fraction", "shard_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class _Planned:
    """One film before it is drawn."""

    number: int
    patient: int
    split: str
    view: View
    kind: OpacityKind | None
    image_format: str
    in_shard: bool

    @property
    def name(self) -> str:
        stem = f"film-{self.number:05d}.{self.image_format}"
        return stem if self.in_shard else f"loose/{stem}"


def write_phantom_archive(
    store: Store, settings: PhantomSettings, on_progress: Callable[[int], object] | None = None
) -> None:
    """Write `archive/loose/…`, `archive/shards/…`, `labels.csv` and `boxes.csv` under the root.

    In the labels, `image` is the key under `archive/`, or the member's name in a shard.
    `on_progress` is called with the number of films drawn since the last call. Raises `UserError`
    if `store` cannot be written to.
    """
    labels: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    members: dict[str, bytes] = {}
    shards = 0

    def close_shard() -> None:
        nonlocal shards
        store.write(f"archive/shards/phantom-{shards:03d}.tar", _tar(members))
        shards += 1
        members.clear()

    for film in _plan(settings):
        row, found, data = _film(film, settings)
        labels.append(row)
        boxes += [{"image": film.name, **vars(box)} for box in found]
        if film.in_shard:
            members[film.name] = data
            if len(members) == settings.images_per_shard:
                close_shard()
        else:
            store.write(f"archive/{film.name}", data)
        if on_progress is not None:
            on_progress(1)
    if members:
        close_shard()
    store.write("labels.csv", _csv(labels, _LABEL_COLUMNS))
    store.write("boxes.csv", _csv(boxes, ("image", "x", "y", "width", "height")))


def _plan(settings: PhantomSettings) -> Iterator[_Planned]:
    rng = np.random.default_rng(settings.seed)
    number = patient = 0
    while number < settings.images:
        films = min(int(rng.integers(1, _MAX_FILMS_PER_PATIENT + 1)), settings.images - number)
        for _ in range(films):
            kind = OPACITY_KINDS[rng.integers(len(OPACITY_KINDS))]
            yield _Planned(
                number=number,
                patient=patient,
                split=_SPLITS[patient % len(_SPLITS)],
                view="AP" if rng.random() < 0.5 else "PA",
                kind=kind if rng.random() < settings.opacity_fraction else None,
                image_format=str(rng.choice(list(_FORMATS), p=list(_FORMATS.values()))),
                in_shard=bool(rng.random() < settings.shard_fraction),
            )
            number += 1
        patient += 1


def _film(film: _Planned, settings: PhantomSettings) -> tuple[dict[str, Any], list[Box], bytes]:
    """Row of labels, opacity boxes and bytes of one film."""
    person = np.random.default_rng([settings.seed, 1, film.patient])
    sex: Sex = "M" if person.random() < 0.5 else "F"
    age = int(person.integers(18, 90))
    body = draw_body(person, sex, age)
    rng = np.random.default_rng([settings.seed, 2, film.number])
    drawn = draw_film(rng, body, film.view, film.kind, settings.image_size)
    row = {
        "image": film.name,
        "label": "Normal" if film.kind is None else "Lung_Opacity",
        "split": film.split,
        "patient_id": f"phantom-{film.patient:05d}",
        "view_position": film.view,
        "patient_sex": sex,
        "patient_age_years": age,
    }
    if film.image_format == "dcm":
        data = _dicom(drawn, film, row, settings.seed, rng.random() < _MONOCHROME1_FRACTION)
    else:
        grey = np.rint(drawn.pixels * (255.0 / WHITE)).astype(np.uint8)
        data = _encoded(grey, film.image_format)
    return row, list(drawn.boxes), data


def _encoded(grey: npt.NDArray[np.uint8], image_format: str) -> bytes:
    from PIL import Image, PngImagePlugin

    buffer = io.BytesIO()
    if image_format == "png":
        info = PngImagePlugin.PngInfo()
        info.add_text("Comment", _COMMENT)
        Image.fromarray(grey).save(buffer, "PNG", pnginfo=info)
    else:
        Image.fromarray(grey).save(buffer, "JPEG", quality=92, comment=_COMMENT)
    return buffer.getvalue()


def _dicom(
    drawn: Film, film: _Planned, row: Mapping[str, Any], seed: int, monochrome1: bool
) -> bytes:
    """An uncompressed DX object with 12 of 16 bits stored."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = f"{_UID_ROOT}{seed}.3.{film.number}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID = f"{_UID_ROOT}{seed}.1.{film.number}"
    dataset.SeriesInstanceUID = f"{_UID_ROOT}{seed}.2.{film.number}"
    dataset.Modality = "DX"
    dataset.BodyPartExamined = "CHEST"
    dataset.ViewPosition = film.view
    dataset.PatientName = "SYNTHETIC^PHANTOM"
    dataset.PatientID = row["patient_id"]
    dataset.PatientSex = row["patient_sex"]
    dataset.PatientAge = f"{row['patient_age_years']:03d}Y"
    dataset.ImageComments = _COMMENT
    dataset.Rows, dataset.Columns = drawn.pixels.shape
    dataset.ImagerPixelSpacing = [f"{drawn.pixel_spacing_mm:.4f}"] * 2
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if monochrome1 else "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.WindowCenter, dataset.WindowWidth = (WHITE + 1) // 2, WHITE + 1
    stored = WHITE - drawn.pixels if monochrome1 else drawn.pixels
    dataset.PixelData = stored.astype("<u2").tobytes()
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _tar(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)  # its mtime is 0, so the same films give the same bytes
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _csv(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()
