"""Numbers and names in sentences, and numbers in JSON."""

from __future__ import annotations

import math
from typing import Any


def counted(number: float, of: str) -> str:
    """`1 core`, `2 cores`, `0.5 GPUs`."""
    figure = number if isinstance(number, int) else f"{number:g}"
    return f"{figure} {of}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """The text with everything escaped that a terminal would obey or hide: line breaks as `\\n`,
    escape sequences, marks that turn the writing direction. An archive chooses its own names."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def finite(value: Any) -> Any:
    """The value, or what it consists of, with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
