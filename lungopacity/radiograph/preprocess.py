"""From grey pixels of any size to the square that a network takes. The model folder keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Pixel = TypeVar("Pixel", bound=np.generic)

_BLACK = 20
"""JPEG and film noise raise the black of a border to at most this value."""
_DARK = 64
"""A film whose 95th percentile is below this is underexposed, and its black is darker, too."""
_SPECKS = 0.01
"""Share of a row or column of the border that may be brighter."""
_SAMPLED_SIDE = 512
_LEAST_SIDE = 0.25
"""Share of the film's longer side. If either side of what is left is shorter, then what was found
is a line of text on black, and not a film within borders."""


@dataclass(frozen=True)
class Preprocessing:
    """How a radiograph becomes a model's input. `model_id` hashes these settings, too."""

    image_size: int = 160
    """Side of the square, in pixels."""
    mean: float = 0.5
    """Subtracted from grey values scaled to 0 … 1."""
    std: float = 0.25
    """Divides what is left after that."""
    crop_borders: bool = False
    """Cut away black borders (collimation, or the surround of segmented lungs), so that the chest
    fills the square: lungs of lung-field films get as many pixels as with 1.3 times the side."""

    def __post_init__(self) -> None:
        if not 32 <= self.image_size <= 2048:
            raise ValueError(f"image_size must be from 32 to 2048, not {self.image_size}")
        if not self.std > 0:
            raise ValueError(f"std must be above 0, not {self.std}")

    @property
    def at_least(self) -> int:
        """The longer side, in pixels, at which a film must be decoded. Cropping rarely leaves less
        than half of it."""
        return self.image_size * (2 if self.crop_borders else 1)

    def square(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The network's input, (image_size, image_size) uint8: crops, fits, then pads."""
        return self.pad(self.fit(self.crop(pixels)))

    def crop(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """A view of the film without its black borders, if `crop_borders`; else the film.

        pixels: (height, width) uint8.
        """
        left, top, right, bottom = self.edges(pixels)
        return pixels[top:bottom, left:right] if self.crop_borders else pixels

    def edges(self, pixels: npt.NDArray[np.uint8]) -> tuple[int, int, int, int]:
        """Left, top, right and bottom, in pixels, of what `crop` leaves."""
        height, width = pixels.shape
        whole = (0, 0, width, height)
        if not self.crop_borders:
            return whole
        step = max(1, max(height, width) // _SAMPLED_SIDE)
        # A matrix product sums in a third of the time of `mean` of booleans. Counts of so few
        # pixels are exact in float32.
        coarse = pixels[::step, ::step]
        bright = (coarse > _black_level(coarse)).astype(np.float32)
        down, across = bright.shape
        rows = np.flatnonzero(bright @ np.ones(across, np.float32) > _SPECKS * across)
        columns = np.flatnonzero(np.ones(down, np.float32) @ bright > _SPECKS * down)
        if not len(rows) or not len(columns):
            return whole
        left, top = int(columns[0]) * step, int(rows[0]) * step
        right = min(width, (int(columns[-1]) + 1) * step)
        bottom = min(height, (int(rows[-1]) + 1) * step)
        large = min(right - left, bottom - top) >= _LEAST_SIDE * max(height, width)
        return (left, top, right, bottom) if large else whole

    def fit(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Shrink (area-weighted) or enlarge, so that the longer side has `image_size` pixels.

        pixels: (height, width) uint8. The aspect ratio is kept: stretching a film would change the
        shape of a heart.
        """
        from PIL import Image

        size = self.image_size
        height, width = pixels.shape
        scale = size / max(height, width)
        target = (max(1, round(width * scale)), max(1, round(height * scale)))
        if target == (width, height):
            return np.ascontiguousarray(pixels)
        # Pillow's BILINEAR widens its kernel when it shrinks, so there is no aliasing.
        return np.asarray(
            Image.fromarray(pixels).resize(target, Image.Resampling.BILINEAR), dtype=np.uint8
        )

    def roughly_fit(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Shrink to about `image_size` by a whole factor, taking means of squares of pixels. Takes
        a third of the time of `fit`."""
        from PIL import Image

        factor = round(max(pixels.shape) / self.image_size)
        if factor < 2:
            return self.fit(pixels)
        return np.asarray(Image.fromarray(pixels).reduce(factor), dtype=np.uint8)

    def pad(self, content: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Centre the result of `fit` on a black square."""
        size = self.image_size
        height, width = content.shape
        if (height, width) == (size, size):
            return content
        square = np.zeros((size, size), np.uint8)
        top, left = (size - height) // 2, (size - width) // 2
        square[top : top + height, left : left + width] = content
        return square

    def unpad(self, square: npt.NDArray[Pixel], height: int, width: int) -> npt.NDArray[Pixel]:
        """The inverse of `pad`: the part of a square, or of a map of it, that is the film.

        square: (image_size, image_size). height, width: of the result of `fit`. Returns a view.
        """
        size = self.image_size
        assert square.shape == (size, size), square.shape
        top, left = (size - height) // 2, (size - width) // 2
        return square[top : top + height, left : left + width]


def _black_level(pixels: npt.NDArray[np.uint8]) -> int:
    """The brightest grey value that may be border. An int, with which numpy compares uint8 in a
    quarter of the time that a float takes."""
    few = pixels[::8, ::8].ravel()
    place = int(0.95 * (few.size - 1))
    bright = float(np.partition(few, place)[place])
    return int(_BLACK * min(1.0, bright / _DARK))
