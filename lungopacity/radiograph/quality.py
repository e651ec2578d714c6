"""Judges from its pixels and the patient's age whether a film is fit to be scored, before any model
sees it.

The thresholds were set on 3,564 lung-field films of the RSNA challenge (none may be called blank,
nearly black, of low contrast or inverted), on full films and on phantoms; `tests/radiograph/
test_quality.py` checks them. The film is judged as shrunk for the model: there, noise and JPEG
blocks are gone, and all formats are judged alike.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

_MIN_SIDE = 96
_MAX_ASPECT = 2.0
_BLANK_RANGE = 8
_LOW_CONTRAST_RANGE = 64
_BLACK, _WHITE = 8, 247
_NEARLY_BLACK_FRACTION, _NEARLY_WHITE_FRACTION = 0.985, 0.9
_BORDER_TOLERANCE, _BORDER_SPECKS, _CONTENT_FRACTION = 12, 0.02, 0.25
_COLOURED_FRACTION = 0.1
_MIN_JUDGED = 16
"""Pixels of the shorter side; with fewer, the polarity cannot be judged."""
_BAR_SPECKS = 0.01
_ADULT_YEARS = 18
_SPINES = np.linspace(0.34, 0.66, 17)
"""Where the spine may be, as shares of the width. The ninth is the middle."""

Fractions = float | npt.NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """What is wrong with a film. Each flag is a column `quality_<name>`."""

    blank: bool
    """Hardly more than one grey value: 99 % of pixels lie within 8 of 255."""
    nearly_black: bool
    """98.5 % of pixels are black."""
    nearly_white: bool
    """90 % of pixels are white."""
    too_small: bool
    """The shorter side of the stored image has fewer than 96 pixels."""
    inverted: bool
    """Air is bright and bone is dark: the polarity is the wrong way round."""
    colour: bool
    """More than a tenth of the pixels are clearly coloured: a photograph, or a page of a report."""
    low_contrast: bool
    """99 % of pixels lie within 64 of 255."""
    heavy_borders: bool
    """More than three quarters of the image are a uniform border."""
    odd_aspect: bool
    """The longer side is more than twice the shorter."""
    child: bool
    """The header states an age below 18 years. Most models are trained on adults' films; a child's
    thymus, heart and lungs look different."""

    def found(self) -> tuple[str, ...]:
        """The names of the flags that are true."""
        return tuple(flag for flag in QUALITY_FLAGS if getattr(self, flag))


QUALITY_FLAGS = tuple(flag.name for flag in fields(Quality))
OUT_OF_DISTRIBUTION = "out_of_distribution"
"""One more flag, which needs a model: the film is unlike those that the model was trained on."""
REJECTED_BY_DEFAULT = ("blank", "nearly_black", "nearly_white", "too_small", "inverted", "colour")
"""A score of such an image would mean nothing. The other flags only warn."""


def judge(
    content: npt.NDArray[np.uint8],
    rows: int,
    columns: int,
    coloured_fraction: float,
    age_years: int | None,
) -> Quality:
    """Judge one film.

    content: (height, width) uint8, shrunk for the model and not padded. rows, columns: of the
    stored image. coloured_fraction: 0 … 1. age_years: None if the header gives none.
    """
    from PIL import Image

    # Every second row and column, if enough are left, is enough to see where things are, and takes
    # a quarter of the time.
    coarse = content[::2, ::2] if min(content.shape) >= 2 * _MIN_JUDGED else content
    shares = np.cumsum(Image.fromarray(content).histogram()) / content.size
    low, high = np.searchsorted(shares, (0.005, 0.995))
    blank = bool(high - low <= _BLANK_RANGE)
    return Quality(
        blank=blank,
        nearly_black=bool(shares[_BLACK] >= _NEARLY_BLACK_FRACTION),
        nearly_white=bool(1 - shares[_WHITE - 1] >= _NEARLY_WHITE_FRACTION),
        too_small=min(rows, columns) < _MIN_SIDE,
        inverted=not blank and _is_inverted(coarse),
        colour=coloured_fraction > _COLOURED_FRACTION,
        low_contrast=bool(high - low < _LOW_CONTRAST_RANGE),
        heavy_borders=_content_fraction(coarse) < _CONTENT_FRACTION,
        odd_aspect=max(rows, columns) > _MAX_ASPECT * min(rows, columns),
        child=age_years is not None and age_years < _ADULT_YEARS,
    )


def _is_inverted(content: npt.NDArray[np.uint8]) -> bool:
    """Looks for two signs of the wrong polarity. If neither is clear, the film passes.

    A film cut to the lungs has a black surround, so a white surround means inverted. On a full film
    spine and heart are brighter than the lungs beside them, and the air above the shoulders is
    dark. A patient may be off the middle of the film: a dark middle with bright sides means nothing
    if a bright spine stands out as clearly elsewhere.
    """
    if min(content.shape) < _MIN_JUDGED:
        return False
    frame = np.concatenate([content[0], content[-1], content[:, 0], content[:, -1]])
    if frame.mean() > 240 and (content >= _WHITE).mean() > 0.5:
        return True
    # Collimation and padding are black in either polarity, and not part of the film.
    film = _without_black_bars(content)
    height, width = film.shape
    if min(height, width) < _MIN_JUDGED or (film <= _BLACK).mean() >= 0.3:
        return False  # cut to the lungs: the spine is blacked out, in either polarity
    middle = film[height // 4 : 3 * height // 4]
    total_W = np.concatenate([[0.0], middle.mean(axis=0).cumsum()])

    def mean(begin: Fractions, end: Fractions) -> npt.NDArray[np.float64]:
        """Mean of the columns between two shares of the width."""
        first, last = (np.multiply(share, width).astype(int) for share in (begin, end))
        found: npt.NDArray[np.float64] = (total_W[last] - total_W[first]) / (last - first)
        return found

    at = _SPINES
    rises = (
        mean(at - 0.05, at + 0.05) - (mean(at - 0.30, at - 0.12) + mean(at + 0.12, at + 0.30)) / 2
    )
    if -rises.min() <= rises.max():
        return False
    rise = rises[len(rises) // 2]
    corners = film[: height // 6, [*range(width // 8), *range(width - width // 8, width)]].mean()
    centre = mean(0.25, 0.75)
    return bool(rise < -40 or (rise < -20 and corners > centre + 10))


def _without_black_bars(content: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A view of the film without its black bars; the whole film if all of it is black."""
    box = _box(content > _BLACK, _BAR_SPECKS)
    return content if box is None else content[box]


def _content_fraction(content: npt.NDArray[np.uint8]) -> float:
    """Share of the image within the smallest box that holds everything unlike its outermost
    pixels."""
    frame = np.concatenate([content[0], content[-1], content[:, 0], content[:, -1]])
    # Twice the values: a median may lie halfway between two integers.
    from_frame = 2 * content.astype(np.int16) - np.int16(2 * np.median(frame))
    box = _box(np.abs(from_frame) > 2 * _BORDER_TOLERANCE, _BORDER_SPECKS)
    return 0.0 if box is None else content[box].size / content.size


def _box(of_HW: npt.NDArray[np.bool_], specks: float) -> tuple[slice, slice] | None:
    """The smallest box that holds all rows and columns of which more than a share of `specks` is
    True; None if no row or no column is."""
    height, width = of_HW.shape
    # Sums of uint8 take half of the time of means of booleans.
    ones = of_HW.view(np.uint8)
    rows = np.flatnonzero(ones.sum(axis=1, dtype=np.uint32) > specks * width)
    columns = np.flatnonzero(ones.sum(axis=0, dtype=np.uint32) > specks * height)
    if not len(rows) or not len(columns):
        return None
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
