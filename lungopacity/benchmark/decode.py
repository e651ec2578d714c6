"""Images a second on one core, from the bytes of a file to grey pixels, for each format.

Ours is measured beside every library that a user would call for the format, in its documented best
form. All run in one process, in turns, again and again: a busy neighbour slows them all alike.
"""

from __future__ import annotations

import io
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count as numbers
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from lungopacity.archive.content import ReadSettings
from lungopacity.archive.inventory import take_inventory
from lungopacity.archive.reading import read_files
from lungopacity.benchmark.place import NO_GPU, gpus_here
from lungopacity.errors import ImageError, UserError
from lungopacity.models import load_model
from lungopacity.progress import Progress
from lungopacity.radiograph import DecodeLimits, Preprocessing, decode_radiographs

log = logging.getLogger(__name__)

Grey = npt.NDArray[np.uint8]
Decode = Callable[[bytes], Grey]
DecodeAll = Callable[[Sequence[bytes]], list[Grey]]

_REDUCED = 224
_NVJPEG = "nvJPEG"
_LIMITS = DecodeLimits()


@dataclass(frozen=True)
class DecodeSpeed:
    """One way to decode one format."""

    format: str
    way: str
    images_per_s: float
    """Median over the repeats, on one core; for nvJPEG on a GPU, with all files in one call."""
    spread: float
    """Half the range between the quartiles, as a share of the median."""
    max_difference: int
    """From our pixels, in grey levels from 0 to 255; -1 if the size differs."""


def decode_speeds(
    images: str | None = None, model: str | None = None, *, count: int = 24, repeats: int = 9
) -> list[DecodeSpeed]:
    """Measure every format.

    images: URI of films to encode in each format; None draws phantoms. `model`: URI of a model;
    JPEGs are also decoded straight to its input size; None: to 224 pixels a side. `count`: how many
    films. Films that cannot be decoded are skipped. Raises `UserError` if none is left.
    """
    if count < 1 or repeats < 1:
        raise UserError("--count and --repeats must be at least 1")
    films = list(islice(_phantoms() if images is None else _films(images), count))
    if not films:
        raise UserError(f"{images}: holds no film that can be decoded; give other --images")
    reduced = _REDUCED if model is None else load_model(model).spec.preprocessing.at_least
    formats = _formats(reduced)
    speeds: list[DecodeSpeed] = []
    with Progress("Decoding", total=len(formats), unit="formats") as progress:
        for name, (encode, ways) in formats.items():
            files = [encode(film) for film in films]
            found = list(_measured(name, files, ways, repeats))
            speeds += found
            rates = ", ".join(f"{speed.way} {speed.images_per_s:.1f}" for speed in found)
            # Logged at once, because a run that is cut short prints no table.
            log.info("%s: %s images/s", name, rates)
            progress.advance(1)
    return speeds


def table(speeds: Sequence[DecodeSpeed]) -> str:
    """A line for each way; `ours / it` is our rate over its rate."""
    lines = [
        f"{'format':<24}{'way':<14}{'images/s':>10}{'spread':>9}{'ours / it':>11}{'differs':>9}"
    ]
    ours = {speed.format: speed.images_per_s for speed in speeds if speed.way == "lungopacity"}
    for speed in speeds:
        ratio = ours[speed.format] / speed.images_per_s
        differs = "size" if speed.max_difference < 0 else str(speed.max_difference)
        lines.append(
            f"{speed.format:<24}{speed.way:<14}{speed.images_per_s:>10.1f}{speed.spread:>8.0%}"
            f"{ratio:>12.2f}{differs:>9}"
        )
    if not any(_NVJPEG in speed.way for speed in speeds):
        lines.append(f"torchvision's {_NVJPEG}: skipped: {NO_GPU}")
    return "\n".join(lines)


def _phantoms() -> Iterator[Grey]:
    from lungopacity.archive.phantom_film import WHITE, draw_body, draw_film

    for seed in numbers():
        body = draw_body(np.random.default_rng(seed), "F", 50)
        film = draw_film(np.random.default_rng([seed, 1]), body, "PA", None, 1024)
        yield np.rint(film.pixels * (255.0 / WHITE)).astype(np.uint8)


def _films(images: str) -> Iterator[Grey]:
    archive = take_inventory(images)
    for _, _, data in read_files(archive.store, archive.objects, ReadSettings(Preprocessing())):
        with suppress(ImageError):
            for found in decode_radiographs(data, limits=_LIMITS):
                if not isinstance(found, ImageError):
                    yield found.pixels


def _measured(
    name: str, files: list[bytes], ways: dict[str, DecodeAll], repeats: int
) -> Iterator[DecodeSpeed]:
    expected = ways["lungopacity"](files)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    differences = {
        way: max(map(_difference, decode(files), expected)) for way, decode in ways.items()
    }
    for _ in range(repeats):
        for way, decode in ways.items():
            began = time.perf_counter()
            decode(files)
            seconds[way].append((time.perf_counter() - began) / len(files))
    for way, taken in seconds.items():
        median = statistics.median(taken)
        low, _, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else (median,) * 3
        spread = (high - low) / 2 / median
        yield DecodeSpeed(name, way, 1 / median, spread, differences[way])


def _difference(found: Grey, expected: Grey) -> int:
    if found.shape != expected.shape:
        return -1
    return int(np.abs(found.astype(np.int16) - expected).max())


def _ours(at_least: int | None) -> Decode:
    def decode(data: bytes) -> Grey:
        (found,) = decode_radiographs(data, limits=_LIMITS, at_least=at_least)
        if isinstance(found, Exception):
            raise found
        return found.pixels

    return decode


# ----------------------------------------------------------------- what a user would call instead


def _pillow(data: bytes) -> Grey:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("L"))


def _pillow_reduced(reduced: int) -> Decode:
    def decode(data: bytes) -> Grey:
        from PIL import Image

        with Image.open(io.BytesIO(data)) as image:
            image.draft("L", _smallest(image.width, image.height, reduced))
            return np.asarray(image)

    return decode


def _simplejpeg(data: bytes) -> Grey:
    import simplejpeg

    pixels: Grey = simplejpeg.decode_jpeg(data, "GRAY")
    return pixels[..., 0]


def _simplejpeg_reduced(reduced: int) -> Decode:
    def decode(data: bytes) -> Grey:
        import simplejpeg

        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        width, height = _smallest(width, height, reduced)
        pixels: Grey = simplejpeg.decode_jpeg(data, "GRAY", min_height=height, min_width=width)
        return pixels[..., 0]

    return decode


def _smallest(width: int, height: int, reduced: int) -> tuple[int, int]:
    """The size that each library is asked for: the longer side has at least `reduced` pixels."""
    scale = reduced / max(width, height)
    return round(width * scale), round(height * scale)


def _torchvision(data: bytes) -> Grey:
    import torch
    from torchvision.io import ImageReadMode, decode_image

    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    pixels: Grey = decode_image(encoded, ImageReadMode.GRAY)[0].numpy()
    return pixels


def _torchvision_batch(device: str) -> DecodeAll:
    def decode(files: Sequence[bytes]) -> list[Grey]:
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg

        encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
        return [
            pixels[0].cpu().numpy() for pixels in decode_jpeg(encoded, ImageReadMode.GRAY, device)
        ]

    return decode


def _each(ways: dict[str, Decode]) -> dict[str, DecodeAll]:
    def all_of(decode: Decode) -> DecodeAll:
        return lambda files: [decode(data) for data in files]

    return {way: all_of(decode) for way, decode in ways.items()}


def _pydicom(data: bytes) -> Grey:
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    dataset = pydicom.dcmread(io.BytesIO(data))
    seen = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    top = 2.0**dataset.BitsStored - 1
    pixels: Grey = np.rint(seen * (255.0 / top)).astype(np.uint8)
    return pixels


# --------------------------------------------------------------------------------------- encoders


def _formats(reduced: int) -> dict[str, tuple[Callable[[Grey], bytes], dict[str, DecodeAll]]]:
    import torch
    from pydicom import uid

    torch.set_num_threads(1)
    pillow = _each({"Pillow": _pillow})
    vision = pillow | _each({"torchvision": _torchvision})
    jpeg = vision | _each({"simplejpeg": _simplejpeg})
    nvjpeg = {_NVJPEG: _torchvision_batch("cuda")} if gpus_here() else {}
    whole = _each({"lungopacity": _ours(None)})
    to_size = _each(
        {
            "lungopacity": _ours(reduced),
            "Pillow": _pillow_reduced(reduced),
            "simplejpeg": _simplejpeg_reduced(reduced),
        }
    )
    dicom = whole | _each({"pydicom": _pydicom})
    syntaxes = {
        "uncompressed": None,
        "deflated": uid.DeflatedExplicitVRLittleEndian,
        "RLE": uid.RLELossless,
        # The only encoder has no wheels for some Pythons; decoding needs only GDCM.
        **({"JPEG-LS": uid.JPEGLSLossless} if find_spec("jpeg_ls") else {}),
        "JPEG 2000": uid.JPEG2000Lossless,
    }
    return {
        "PNG": (_encoder("PNG"), whole | vision),
        "PNG, rows alone": (_png_of_rows, whole | vision),
        "PNG, 16 bits": (_sixteen, whole),
        "JPEG": (_encoder("JPEG", quality=92), whole | jpeg | nvjpeg),
        "JPEG, progressive": (_encoder("JPEG", quality=92, progressive=True), whole | jpeg),
        f"JPEG, to {reduced}": (_encoder("JPEG", quality=92), to_size),
        "TIFF": (_encoder("TIFF"), whole | pillow),
        "JPEG 2000": (_encoder("JPEG2000"), whole | pillow),
        **{f"DICOM, {name}": (_dicom_encoder(syntax), dicom) for name, syntax in syntaxes.items()},
        "DICOM, JPEG": (_dicom_jpeg, dicom),
    }


def _encoder(image_format: str, **options: Any) -> Callable[[Grey], bytes]:
    def encode(film: Grey) -> bytes:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(film).save(buffer, image_format, **options)
        return buffer.getvalue()

    return encode


def _png_of_rows(film: Grey) -> bytes:
    """As OpenCV writes PNGs, and as most films of public sets are: no row is filtered by another
    row."""
    import imagecodecs

    return bytes(imagecodecs.png_encode(film, filter=imagecodecs.PNG.FILTER.SUB))


def _sixteen(film: Grey) -> bytes:
    return _encoder("PNG")(film.astype(np.uint16) * 257)  # type: ignore[arg-type]


def _dicom_encoder(syntax: str | None) -> Callable[[Grey], bytes]:
    def encode(film: Grey) -> bytes:
        from pydicom import uid

        dataset = _dicom_of(film.astype(np.uint16) << 4, bits=12)
        dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
        if syntax == uid.DeflatedExplicitVRLittleEndian:
            dataset.file_meta.TransferSyntaxUID = syntax
        elif syntax is not None:
            dataset.compress(syntax)
        return _saved(dataset)

    return encode


def _dicom_jpeg(film: Grey) -> bytes:
    from pydicom import uid
    from pydicom.encaps import encapsulate

    dataset = _dicom_of(film, bits=8)
    dataset.PixelData = encapsulate([_encoder("JPEG", quality=92)(film)])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    return _saved(dataset)


def _dicom_of(stored: npt.NDArray[Any], bits: int) -> Any:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = (
        DigitalXRayImageStorageForPresentation
    )
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.Modality = "DX"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = 8 * stored.dtype.itemsize
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits - 1, 0
    dataset.PixelData = stored.tobytes()
    return dataset


def _saved(dataset: Any) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
