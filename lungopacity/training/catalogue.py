"""The tables of `lungopacity models`: networks that can be trained, and their settings."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from lungopacity.models import ENSEMBLE, NETWORK_NAMES, build_network, network_card
from lungopacity.models.networks import ENSEMBLE_MADE, TORCHVISION
from lungopacity.progress import Progress
from lungopacity.training.settings import recipe

_BY_OPTION = ("model", "use_gpu")
"""Settings that --set does not change, because they have options of their own."""
_WEIGHTS = {"installed": "installed", "download": "download or FILE", None: "none"}


def networks_table() -> str:
    """A line per network: parameters, input size, origin of ImageNet weights, and source."""
    rows = [("network", "parameters", "input", "ImageNet weights", "source")]
    with Progress("Building networks", total=len(NETWORK_NAMES), unit="networks") as progress:
        for name in NETWORK_NAMES:
            card = network_card(name)
            side = card.preprocessing.image_size
            count = f"{parameters(name):,}"
            rows.append((name, count, f"{side} x {side}", _WEIGHTS[card.weights], card.source))
            progress.advance(1)
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{name:{widths[0]}}  {count:>{widths[1]}}  {side:{widths[2]}}  {weights:{widths[3]}}  "
        f"{source}"
        for name, count, side, weights, source in rows
    ]
    more = f"{TORCHVISION}NAME: any other classifier of torchvision; FILE: --weights FILE"
    made = f"{ENSEMBLE}: {ENSEMBLE_MADE}"
    last = "`lungopacity models NAME` shows the settings that NAME is trained with."
    return "\n".join([*lines, more, made, last])


def parameters(name: str, classes: int = 2, settings: Mapping[str, Any] | None = None) -> int:
    """The number of parameters of the network, without buffers. Raises as `build_network` does."""
    import torch

    # On meta, which needs no memory: the largest of torchvision's networks take gigabytes.
    with torch.device("meta"):
        network = build_network(name, classes, settings)
    return sum(weight.numel() for weight in network.parameters())


def recipe_table(name: str) -> str:
    """Every setting of the network's recipe, its value as `--set` takes it, and what it does.
    Raises `UserError`."""
    if name == ENSEMBLE:
        return f"{ENSEMBLE}: {ENSEMBLE_MADE}"
    settings = recipe(name)
    network = build_network(name, 2, settings.model_settings)
    lines = [f"{name}: train --set NAME=VALUE changes any of these", ""]
    parts = (
        ("", settings),
        ("augmentation.", settings.augmentation),
        ("preprocessing.", settings.preprocessing),
        ("model_settings.", network.settings),
    )
    for prefix, part in parts:
        texts = field_texts(type(part))
        for field, value in vars(part).items():
            if field in _BY_OPTION or isinstance(value, Mapping) or hasattr(value, "__dict__"):
                continue
            # For model_settings, --set takes only JSON.
            plain = isinstance(value, str) and prefix != "model_settings."
            word = value if plain else json.dumps(value)
            lines += [f"{prefix}{field} = {word}", f"    {texts.get(field, '')}"]
    return "\n".join(lines)


def field_texts(settings: type[Any]) -> dict[str, str]:
    """The docstring under each field of a dataclass, read from its source."""
    tree = ast.parse(inspect.getsource(settings).lstrip())
    (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef)]
    texts = {}
    for field, text in pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts
