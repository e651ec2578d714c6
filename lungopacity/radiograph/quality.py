"""Is this picture fit to be scored? Judged from the pixels, before any model sees them.

The limits were set on 3,564 lung-field films of the RSNA challenge (none of which may be blank,
nearly black, of low contrast or inverted), full films and drawn phantoms; `tests/radiograph/
test_quality.py` holds them. They are judged on the film as it was shrunk for the model: noise and
JPEG blocks are gone there, and every format is judged alike.
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
"""Pixels of the shorter side; of fewer nobody can tell the polarity."""
_BAR_SPECKS = 0.01
_SPINES = np.linspace(0.34, 0.66, 17)
"""Where the spine may stand, as shares of the width. The ninth is the middle."""

Fractions = float | npt.NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """What is wrong with a film; each is a column `quality_<name>`."""

    blank: bool
    """One grey value, or nearly: 99 % of pixels lie within 8 of 255."""
    nearly_black: bool
    """98.5 % of pixels are black."""
    nearly_white: bool
    """90 % of pixels are white."""
    too_small: bool
    """The shorter side of the stored image has fewer than 96 pixels."""
    inverted: bool
    """Air is bright and bone is dark: the polarity is the wrong way round."""
    colour: bool
    """A tenth of the pixels are clearly coloured: a photograph, or a report's page."""
    low_contrast: bool
    """99 % of pixels lie within 64 of 255."""
    heavy_borders: bool
    """Three quarters of the picture are one uniform border."""
    odd_aspect: bool
    """More than twice as long as wide, or as wide as long."""

    def found(self) -> tuple[str, ...]:
        """Names of those that are true."""
        return tuple(flag for flag in QUALITY_FLAGS if getattr(self, flag))


QUALITY_FLAGS = tuple(flag.name for flag in fields(Quality))
OUT_OF_DISTRIBUTION = "out_of_distribution"
"""One more flag, which needs a model: the film is unlike those that it was trained on."""
REJECTED_BY_DEFAULT = ("blank", "nearly_black", "nearly_white", "too_small", "inverted", "colour")
"""A score of such a picture means nothing. The other flags warn, and the film is scored."""


def judge(
    content: npt.NDArray[np.uint8], rows: int, columns: int, coloured_fraction: float
) -> Quality:
    """Judge one film.

    content: (height, width) uint8, shrunk, not padded. rows, columns: of the stored image.
    """
    from PIL import Image

    # Where things lie can be told from every second row and column, in a quarter of the time, if
    # that leaves enough of them.
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
    )


def _is_inverted(content: npt.NDArray[np.uint8]) -> bool:
    """Two signs of the wrong polarity; where neither is clear the film passes.

    A film cut to the lungs has a black surround, so a white one is inverted. On a full film the
    spine and heart are brighter than the lungs beside them, and what is above the shoulders is air.
    A patient may lie beside the middle of the film: dark in the middle and bright beside it says
    nothing where a spine that is as clearly bright stands elsewhere.
    """
    if min(content.shape) < _MIN_JUDGED:
        return False
    frame = np.concatenate([content[0], content[-1], content[:, 0], content[:, -1]])
    if frame.mean() > 240 and (content >= _WHITE).mean() > 0.5:
        return True
    # Collimation and padding are black whatever the polarity, and no part of the film.
    film = _without_black_bars(content)
    height, width = film.shape
    if min(height, width) < _MIN_JUDGED or (film <= _BLACK).mean() >= 0.3:
        return False  # cut to the lungs: the spine is black here, whatever the polarity
    middle = film[height // 4 : 3 * height // 4]
    total_W = np.concatenate([[0.0], middle.mean(axis=0).cumsum()])

    def mean(begin: Fractions, end: Fractions) -> npt.NDArray[np.float64]:
        """Of the columns between two shares of the width."""
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
    """A view; all of it where all is black."""
    bright = content > _BLACK
    rows = np.flatnonzero(bright.mean(axis=1) > _BAR_SPECKS)
    columns = np.flatnonzero(bright.mean(axis=0) > _BAR_SPECKS)
    if not len(rows) or not len(columns):
        return content
    return content[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _content_fraction(content: npt.NDArray[np.uint8]) -> float:
    """Share of the picture inside the smallest box that holds all that differs from its frame."""
    frame = np.concatenate([content[0], content[-1], content[:, 0], content[:, -1]])
    differs = np.abs(content.astype(np.int16) - np.median(frame)) > _BORDER_TOLERANCE
    rows = np.flatnonzero(differs.mean(axis=1) > _BORDER_SPECKS)
    columns = np.flatnonzero(differs.mean(axis=0) > _BORDER_SPECKS)
    if not len(rows) or not len(columns):
        return 0.0
    box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    return float(box / content.size)
