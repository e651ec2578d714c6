"""Figures and names in sentences."""

from __future__ import annotations


def counted(number: float, of: str) -> str:
    """`1 core`, `2 cores`, `0.5 GPUs`."""
    figure = number if isinstance(number, int) else f"{number:g}"
    return f"{figure} {of}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """The text with what a terminal would obey or not show (line breaks, escapes, marks that turn
    the direction of writing) written out, as `\\n`: names come from an archive."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
