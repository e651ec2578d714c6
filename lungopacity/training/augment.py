"""Random changes to training films that do not change their class.

Whole batches are changed at once, on the device that holds them. Tensor names carry their shape:
B batch, H height, W width.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from lungopacity.training.settings import AugmentationSettings


def augment(
    pixels_BHW: torch.Tensor, settings: AugmentationSettings, generator: torch.Generator
) -> torch.Tensor:
    """(batch, height, width) uint8 to the same shape and type, each film changed by random amounts
    of its own.

    `generator`: on the CPU, so that a seed draws the same amounts for every device.
    """
    batch, device = len(pixels_BHW), pixels_BHW.device

    def amounts(limit: float) -> torch.Tensor:
        return (torch.rand(batch, generator=generator) * 2 - 1) * limit

    angle_B = amounts(math.radians(settings.rotation_degrees))
    shrink_B = 1 / (1 + amounts(settings.scale))
    mirror_B = 1.0 - 2.0 * (torch.rand(batch, generator=generator) < settings.flip_probability)
    # affine_grid takes the source of each output pixel, in units of half a side.
    source_B23 = torch.zeros(batch, 2, 3)
    source_B23[:, 0, 0] = shrink_B * angle_B.cos() * mirror_B
    source_B23[:, 0, 1] = -shrink_B * angle_B.sin()
    source_B23[:, 1, 0] = shrink_B * angle_B.sin() * mirror_B
    source_B23[:, 1, 1] = shrink_B * angle_B.cos()
    source_B23[:, 0, 2] = 2 * amounts(settings.shift)
    source_B23[:, 1, 2] = 2 * amounts(settings.shift)
    gain_B = 1 + amounts(settings.gain)
    gamma_B = amounts(settings.gamma).exp()

    x_B1HW = pixels_BHW.unsqueeze(1).float().div_(255.0)
    grid_BHW2 = functional.affine_grid(
        source_B23.to(device), list(x_B1HW.shape), align_corners=False
    )
    # Pixels from outside the film are black, like the padding of `Preprocessing.square`.
    x_B1HW = functional.grid_sample(x_B1HW, grid_BHW2, padding_mode="zeros", align_corners=False)
    x_B1HW = x_B1HW.clamp_(0, 1).pow_(gamma_B.to(device)[:, None, None, None])
    x_B1HW = x_B1HW.mul_(gain_B.to(device)[:, None, None, None])
    if settings.erase_probability:
        x_B1HW = _erase(x_B1HW, settings, generator)
    return x_B1HW.mul_(255.0).round_().clamp_(0, 255).to(torch.uint8).squeeze(1)


def _erase(
    x_B1HW: torch.Tensor, settings: AugmentationSettings, generator: torch.Generator
) -> torch.Tensor:
    """Blacks out one rectangle in a share of the films: up to `erase_fraction` of the area, with
    sides of up to 1 : 3. Black is also the colour outside of films and of lung fields."""
    batch, _, height, width = x_B1HW.shape
    chance_B, area_B, ratio_B, y_B, x_B = torch.rand(5, batch, generator=generator)
    area_B = area_B * settings.erase_fraction * height * width
    ratio_B = ((ratio_B * 2 - 1) * math.log(3.0)).exp()
    tall_B, wide_B = (area_B * ratio_B).sqrt(), (area_B / ratio_B).sqrt()
    top_B, left_B = y_B * (height - tall_B), x_B * (width - wide_B)
    rows_H, columns_W = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    rows_BH = (rows_H > top_B[:, None]) & (rows_H < (top_B + tall_B)[:, None])
    columns_BW = (columns_W > left_B[:, None]) & (columns_W < (left_B + wide_B)[:, None])
    erased_BHW = rows_BH[:, :, None] & columns_BW[:, None, :]
    erased_BHW &= (chance_B < settings.erase_probability)[:, None, None]
    return x_B1HW.masked_fill_(erased_BHW[:, None].to(x_B1HW.device), 0.0)
