"""Turns uint8 pixels into a network's input, on the network's device.

Processes exchange only uint8: float32 in three channels would take twelve times the bytes.
"""

from __future__ import annotations

import torch

from lungopacity.radiograph import Preprocessing


def normalise(pixels_BHW: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """(batch, height, width) uint8 to x_B1HW float32, channels_last."""
    x_B1HW = pixels_BHW.unsqueeze(1).float().div_(255.0)
    x_B1HW = x_B1HW.sub_(preprocessing.mean).div_(preprocessing.std)
    return x_B1HW.contiguous(memory_format=torch.channels_last)
