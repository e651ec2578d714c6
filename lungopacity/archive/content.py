"""Turns the bytes of one file into the content columns of its rows. Runs in the decoder's
process."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lungopacity.errors import REJECTING, ErrorCode, ImageError, Stage, Status, UserError
from lungopacity.radiograph import (
    ACCEPTABLE,
    OUT_OF_DISTRIBUTION,
    QUALITY_FLAGS,
    REJECTED_BY_DEFAULT,
    DecodeLimits,
    Preprocessing,
    Quality,
    Radiograph,
    decode_radiographs,
    judge,
)

if TYPE_CHECKING:
    from lungopacity.models import TrainedModel


@dataclass(frozen=True)
class ReadSettings:
    """How objects are read, and which of them are rejected."""

    preprocessing: Preprocessing
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    accept: frozenset[ErrorCode] = frozenset()
    """Codes of `ACCEPTABLE` that do not reject a film."""
    reject_quality: frozenset[str] = frozenset(REJECTED_BY_DEFAULT)
    """Flags of `Quality` that reject a film; the others only mark it. `out_of_distribution` has no
    effect here: the model judges it."""
    hmac_key: bytes | None = field(default=None, repr=False)
    """The key of `patient_hmac` and `study_hmac`; without it, they are null."""
    fetch_threads: int = 32
    """Requests that one task makes at once, to hide the latency of S3. At 40 ms, 32 of them fetch
    800 small objects a second, which is what a core decodes."""
    rows_per_table: int = 64

    def __post_init__(self) -> None:
        if self.fetch_threads < 1 or self.rows_per_table < 1:
            raise ValueError("fetch_threads and rows_per_table must be at least 1")


def settings_of_model(
    uri: str,
    model: TrainedModel,
    accept: Collection[str],
    reject_quality: Collection[str] | None,
) -> ReadSettings:
    """The settings to read films for a model, from the user's words.

    `accept`, `reject_quality`: as in `ReadSettings`; None is the default. Raises `UserError` for an
    unknown word, and for `out_of_distribution` if the model folder at `uri` does not hold the
    distribution of its training films: no film would be rejected.
    """
    accepted, rejecting = rules_from(accept, reject_quality, (*QUALITY_FLAGS, OUT_OF_DISTRIBUTION))
    if OUT_OF_DISTRIBUTION in rejecting and model.distribution is None:
        raise UserError(
            f"--reject-quality {OUT_OF_DISTRIBUTION}: {uri} does not hold the distribution of its "
            "training films (an older folder, or an ensemble with one); leave the flag out, or "
            "train again"
        )
    return ReadSettings(model.spec.preprocessing, accept=accepted, reject_quality=rejecting)


def rules_from(
    accept: Collection[str],
    reject_quality: Collection[str] | None,
    flags: Collection[str] = QUALITY_FLAGS,
) -> tuple[frozenset[ErrorCode], frozenset[str]]:
    """The fields `accept` and `reject_quality` of `ReadSettings`, from the user's words. With a
    model use `settings_of_model`.

    `reject_quality`: None is the default. `flags`: those it may name. Raises `UserError` for an
    unknown word.
    """
    for option, words, known in (
        ("--accept", accept, {code.value for code in ACCEPTABLE}),
        ("--reject-quality", reject_quality or (), flags),
    ):
        for word in words:
            if word not in known:
                raise UserError(f"{option}: '{word}' is none of {', '.join(sorted(known))}")
    rejecting = REJECTED_BY_DEFAULT if reject_quality is None else reject_quality
    return frozenset(map(ErrorCode, accept)), frozenset(rejecting)


def content_rows(data: bytes, settings: ReadSettings) -> Iterator[dict[str, Any]]:
    """The content columns of a row, with its `pixels`, for each image of the file: at least one.

    Never raises: an image that cannot be read gives a row, too.
    """
    digest = {"content_sha256": hashlib.sha256(data).hexdigest()}
    try:
        for found in shown_films(data, settings):
            if isinstance(found, ImageError):
                yield digest | error_columns(found)
            else:
                yield digest | _film_columns(found, settings)
    except Exception as error:
        yield digest | error_columns(error)


@dataclass(frozen=True)
class ShownFilm:
    """A film decoded for a model, and the part of it that the model sees."""

    film: Radiograph
    edges: tuple[int, int, int, int]
    """Left, top, right and bottom of that part, in pixels of `film.pixels`."""

    @property
    def shown(self) -> npt.NDArray[np.uint8]:
        """The part that the model sees: a view, (height, width) uint8."""
        left, top, right, bottom = self.edges
        return self.film.pixels[top:bottom, left:right]


def shown_films(data: bytes, settings: ReadSettings) -> Iterator[ShownFilm | ImageError]:
    """Every film of a file, decoded large enough for its `shown` part to be shrunk to the model's
    input.

    Yields an `ImageError` for a frame that cannot be decoded. Raises `ImageError` for a file that
    cannot be decoded at all.
    """
    return _shown_films(data, settings, settings.preprocessing.at_least)


def _shown_films(
    data: bytes, settings: ReadSettings, at_least: int | None
) -> Iterator[ShownFilm | ImageError]:
    for found in decode_radiographs(
        data,
        limits=settings.limits,
        at_least=at_least,
        accept=settings.accept,
        hmac_key=settings.hmac_key,
    ):
        if isinstance(found, ImageError):
            yield found
            continue
        edges = settings.preprocessing.edges(found.pixels)
        if at_least is not None and _is_small_part(edges, found):
            # The JPEG was scaled for the film with its wide border: decode again, at full size.
            yield from _shown_films(data, settings, None)
        else:
            yield ShownFilm(found, edges)


def _is_small_part(edges: tuple[int, int, int, int], film: Radiograph) -> bool:
    """Whether so little of a scaled JPEG is within its borders that `at_least` was not enough."""
    left, top, right, bottom = edges
    is_shrunk = film.format == "jpeg" and film.pixels.size < film.rows * film.columns
    return is_shrunk and 2 * max(right - left, bottom - top) < max(film.pixels.shape)


def _film_columns(found: ShownFilm, settings: ReadSettings) -> dict[str, Any]:
    film, cropped = found.film, found.shown
    is_cropped = cropped.shape != film.pixels.shape
    # The whole film is judged, even if the model sees only a part of it.
    shrink = settings.preprocessing.roughly_fit if is_cropped else settings.preprocessing.fit
    content = shrink(film.pixels)
    quality = judge(
        content, film.rows, film.columns, film.coloured_fraction, film.patient_age_years
    )
    facts = {**film.facts(), "view_unknown": film.view_position is None, **_columns_of(quality)}
    rejecting = [flag for flag in quality.found() if flag in settings.reject_quality]
    if rejecting:
        error = ImageError(ErrorCode.POOR_QUALITY, Stage.DECODE, ", ".join(rejecting), facts)
        return error_columns(error)
    if is_cropped:
        content = settings.preprocessing.fit(cropped)
    height, width = content.shape
    return {
        **facts,
        "status": Status.OK.value,
        "pixels": settings.preprocessing.pad(content).tobytes(),
        "shown_height": height,
        "shown_width": width,
        "shown_edges": _in_stored_pixels(found.edges, film),
    }


def _in_stored_pixels(edges: tuple[int, int, int, int], film: Radiograph) -> list[float]:
    """Convert left, top, right and bottom from decoded pixels to pixels of the stored image.

    If EXIF turned the image by 90°, they are pixels of the turned image.
    """
    height, width = film.pixels.shape
    rows, columns = film.rows, film.columns
    # Only DICOM films may have oblong pixels, which change their shape without turning them.
    if film.format != "dicom" and rows != columns and (height > width) != (rows > columns):
        rows, columns = columns, rows
    left, top, right, bottom = edges
    across, down = columns / width, rows / height
    return [left * across, top * down, right * across, bottom * down]


def _columns_of(quality: Quality) -> dict[str, bool]:
    return {f"quality_{flag}": value for flag, value in vars(quality).items()}


def error_columns(error: Exception) -> dict[str, Any]:
    """The columns that say why there is no score. Of an unforeseen exception they hold only the
    type: its message could quote a header."""
    if not isinstance(error, ImageError):
        error = ImageError(ErrorCode.INTERNAL, Stage.DECODE, f"unforeseen {type(error).__name__}")
    status = Status.REJECTED if error.code in REJECTING else Status.FAILED
    return {
        **error.facts,
        "status": status.value,
        "error_code": error.code.value,
        "error_stage": error.stage.value,
        "error_message": error.message,
    }
