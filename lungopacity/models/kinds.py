"""Of what kind each setting of a network is; what a user or a model folder gives is JSON."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any


def check_kinds(settings: Any) -> None:
    """Raises `ValueError` where a field of the dataclass is of another kind than its default; None
    stands for a whole number that need not be there."""
    for field in fields(settings):
        value, default = getattr(settings, field.name), field.default
        if isinstance(default, tuple):
            kind = "a list of whole numbers"
            fits = isinstance(value, list | tuple) and all(map(_is_whole, value))
        elif isinstance(default, bool):
            # 0 and 1 were taken for it before, and stand in model folders.
            kind, fits = "true or false", value in (False, True)
        elif isinstance(default, float):
            kind, fits = "a number", _is_whole(value) or isinstance(value, float)
        else:
            kind, fits = "a whole number", _is_whole(value) or (value is None and default is None)
        if not fits:
            such = "" if default is None else f", as {json.dumps(default)}"
            raise ValueError(f"{field.name} must be {kind}{such}, not {json.dumps(value)}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
