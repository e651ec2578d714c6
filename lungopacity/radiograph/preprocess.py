"""Grey pixels of any size to the square that a network takes. Stored in the model folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Pixel = TypeVar("Pixel", bound=np.generic)


@dataclass(frozen=True)
class Preprocessing:
    """How a radiograph becomes a model's input; part of what `model_id` hashes."""

    image_size: int = 160
    """Side of the square, in pixels."""
    mean: float = 0.5
    """Subtracted from grey values scaled to 0 … 1."""
    std: float = 0.25
    """The rest is divided by this."""

    def __post_init__(self) -> None:
        if not 32 <= self.image_size <= 2048:
            raise ValueError(f"image_size must be from 32 to 2048, not {self.image_size}")
        if not self.std > 0:
            raise ValueError(f"std must be above 0, not {self.std}")

    def square(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """`pad` of `fit`: what the network takes, (image_size, image_size) uint8."""
        return self.pad(self.fit(pixels))

    def fit(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Shrink (area-weighted) or enlarge, so that the longer side has `image_size` pixels.

        pixels: (height, width) uint8. The aspect ratio is kept: stretching a film changes the shape
        of a heart.
        """
        from PIL import Image

        size = self.image_size
        height, width = pixels.shape
        scale = size / max(height, width)
        target = (max(1, round(width * scale)), max(1, round(height * scale)))
        if target == (width, height):
            return np.ascontiguousarray(pixels)
        # Pillow's BILINEAR widens its kernel when shrinking, so nothing aliases.
        return np.asarray(
            Image.fromarray(pixels).resize(target, Image.Resampling.BILINEAR), dtype=np.uint8
        )

    def pad(self, content: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Centre what `fit` gave on a black square."""
        size = self.image_size
        height, width = content.shape
        if (height, width) == (size, size):
            return content
        square = np.zeros((size, size), np.uint8)
        top, left = (size - height) // 2, (size - width) // 2
        square[top : top + height, left : left + width] = content
        return square

    def unpad(self, square: npt.NDArray[Pixel], height: int, width: int) -> npt.NDArray[Pixel]:
        """The inverse of `pad`: what of a square, or of a map of it, is the film.

        square: (image_size, image_size). height, width: of what `fit` gave. Returns a view.
        """
        size = self.image_size
        assert square.shape == (size, size), square.shape
        top, left = (size - height) // 2, (size - width) // 2
        return square[top : top + height, left : left + width]
