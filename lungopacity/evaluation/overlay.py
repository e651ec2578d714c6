"""Draw a film with its class activation map, as a picture for people.

The picture shows the film as the network gets it, enlarged, under the map in a perceptually uniform
colour map that is more opaque where the map is higher. A strip below holds the probability, the
decision and the notice. No name of an object and no text of a header is drawn.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from lungopacity.errors import NOTICE

_COLOUR_MAP = "inferno"
_OPACITY = 0.55
"""Opacity where the map is 1; elsewhere in proportion to the map."""
# From Okabe & Ito 2008. The colour map inferno has no blue as light as this.
_BOX_COLOUR = (86, 180, 233)
_PEAK_COLOUR = (255, 255, 255)
_HALO = (0, 0, 0)
_STRIP = (16, 16, 16)
_LEAST_FONT = 9.0
_TEXT, _QUIET_TEXT = (240, 240, 240), (170, 170, 170)


@dataclass(frozen=True)
class Caption:
    """The text of the strip."""

    positive_class: str
    probability: float
    decision: str
    synthetic: bool = False

    @property
    def lines(self) -> tuple[str, str]:
        made = " Synthetic." if self.synthetic else ""
        name = self.positive_class.replace("_", " ")
        return f"{name} {self.probability:.3f}, {self.decision}", NOTICE + made


def overlay_png(
    film: npt.NDArray[np.uint8],
    activation: npt.NDArray[np.float32],
    caption: Caption,
    *,
    side: int,
    boxes: npt.NDArray[np.float64] | None = None,
    peak: tuple[float, float] | None = None,
) -> bytes:
    """The picture as PNG; its longer side without the strip has `side` pixels.

    film: (height, width). activation: the same shape, 0 … 1. boxes: (m, 4) x, y, width and height
    in the film's pixels; drawn as outlines. peak: x and y in the film's pixels; drawn as a ring.
    The same arguments give the same bytes.
    """
    assert film.shape == activation.shape, (film.shape, activation.shape)
    height, width = film.shape
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    grey = _resized(film.astype(np.float32) / np.float32(255), size)
    value = _resized(activation, size)
    colours = _colours()[np.rint(value * 255).astype(np.uint8)]
    opacity = (_OPACITY * value)[..., None]
    mixed = (1 - opacity) * grey[..., None] + opacity * colours
    picture = Image.fromarray(np.rint(mixed * 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for box in [] if boxes is None else boxes * scale:
        x, y, wide, high = (float(number) for number in box)
        _outlined(draw, (x, y, x + wide, y + high), max(1, side // 400))
    if peak is not None:
        _ringed(draw, peak[0] * scale, peak[1] * scale, max(3.0, side / 80))
    buffer = io.BytesIO()
    # Not optimised: optimising makes files 6 % smaller, but takes ten times as long.
    _with_strip(picture, caption, side).save(buffer, "PNG")
    return buffer.getvalue()


def _resized(values: npt.NDArray[np.float32], size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Resize values of 0 … 1, and clip to that range again."""
    resized = Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(resized, np.float32).clip(0, 1)


@cache
def _colours() -> npt.NDArray[np.float32]:
    """The colour map, (256, 3), 0 … 1."""
    from matplotlib import colormaps

    table: npt.NDArray[np.float32] = colormaps[_COLOUR_MAP](np.arange(256))[:, :3]
    return table.astype(np.float32)


def _outlined(
    draw: ImageDraw.ImageDraw, edges: tuple[float, float, float, float], width: int
) -> None:
    left, top, right, bottom = edges
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=_HALO, width=width + 2)
    draw.rectangle((left, top, right, bottom), outline=_BOX_COLOUR, width=width)


def _ringed(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float) -> None:
    for more, colour, width in ((1, _HALO, 3), (0, _PEAK_COLOUR, 1)):
        reach = radius + more
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), outline=colour, width=width)


def _with_strip(picture: Image.Image, caption: Caption, side: int) -> Image.Image:
    """Add the strip below the picture. It is at least as wide as its text; a narrower picture is
    centred."""
    sizes = [max(_LEAST_FONT, side / share) for share in (22, 28)]
    fonts = [ImageFont.load_default(size) for size in sizes]
    margin = max(4, side // 64)
    edges = [font.getbbox(line) for font, line in zip(fonts, caption.lines, strict=True)]
    width = max(picture.width, *(int(edge[2]) + 2 * margin for edge in edges))
    heights = [round(size * 1.35) for size in sizes]
    whole = Image.new("RGB", (width, picture.height + sum(heights) + margin), _STRIP)
    whole.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(whole)
    top = picture.height + margin // 2
    for line, font, high, colour in zip(
        caption.lines, fonts, heights, (_TEXT, _QUIET_TEXT), strict=True
    ):
        draw.text((margin, top), line, font=font, fill=colour)
        top += high
    return whole
