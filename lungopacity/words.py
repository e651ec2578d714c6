"""Figures in sentences."""

from __future__ import annotations


def counted(number: float, of: str) -> str:
    """`1 core`, `2 cores`, `0.5 GPUs`."""
    figure = number if isinstance(number, int) else f"{number:g}"
    return f"{figure} {of}{'' if number == 1 else 's'}"
