"""Type checks for a network's settings, which users and model folders give as JSON."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any


def check_kinds(settings: Any) -> None:
    """Raises `ValueError` where the type of a field differs from that of its default. A default of
    None stands for an optional whole number."""
    for field in fields(settings):
        value, default = getattr(settings, field.name), field.default
        if isinstance(default, tuple):
            kind = "a list of whole numbers"
            fits = isinstance(value, list | tuple) and all(map(_is_whole, value))
        elif isinstance(default, bool):
            # Earlier versions accepted 0 and 1, and wrote them into model folders.
            kind, fits = "true or false", value in (False, True)
        elif isinstance(default, float):
            kind, fits = "a number", _is_whole(value) or isinstance(value, float)
        else:
            kind, fits = "a whole number", _is_whole(value) or (value is None and default is None)
        if not fits:
            no_example = default is None or isinstance(default, bool)
            example = "" if no_example else f", such as {json.dumps(default)}"
            raise ValueError(f"{field.name} must be {kind}{example}, not {json.dumps(value)}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
