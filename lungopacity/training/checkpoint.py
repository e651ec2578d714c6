"""What a training run needs to go on after a crash, in safetensors and JSON: no pickle.

network.safetensors             weights and buffers, as they go into the model folder
learning.safetensors            the weights that go on learning, where others are their average
optimizer.safetensors           Adam's moments, named <parameter number>.<moment>
validation_logits.safetensors   of this epoch, for the calibration
history.json                    one row for each epoch so far; the last is this one
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from lungopacity.models import weights_of

NETWORK_FILE = "network.safetensors"
LOGITS_FILE = "validation_logits.safetensors"
HISTORY_FILE = "history.json"
_LEARNING_FILE = "learning.safetensors"
_OPTIMIZER_FILE = "optimizer.safetensors"


def write_checkpoint(
    folder: str,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, Any]],
    logits_VK: torch.Tensor,
    averaged: torch.nn.Module | None = None,
) -> None:
    """Write all files into `folder`. `averaged`: what is kept instead of `network`."""
    root = Path(folder)
    moments = {
        f"{number}.{name}": tensor.detach().cpu().contiguous()
        for number, tensors in optimizer.state_dict()["state"].items()
        for name, tensor in tensors.items()
    }
    (root / NETWORK_FILE).write_bytes(weights_of(averaged or network))
    if averaged is not None:
        (root / _LEARNING_FILE).write_bytes(weights_of(network))
    (root / _OPTIMIZER_FILE).write_bytes(safetensors.torch.save(moments))
    (root / LOGITS_FILE).write_bytes(safetensors.torch.save({"logits_VK": logits_VK}))
    (root / HISTORY_FILE).write_text(json.dumps(history), encoding="utf-8")


def read_checkpoint(
    folder: str,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    averaged: torch.nn.Module | None = None,
) -> list[dict[str, Any]]:
    """Load weights and moments into `network`, `averaged` and `optimizer`, on whatever device they
    are.

    Returns the history.
    """
    root = Path(folder)
    kept = safetensors.torch.load((root / NETWORK_FILE).read_bytes())
    if averaged is None:
        network.load_state_dict(kept)
    else:
        averaged.load_state_dict(kept)
        network.load_state_dict(safetensors.torch.load((root / _LEARNING_FILE).read_bytes()))
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in safetensors.torch.load((root / _OPTIMIZER_FILE).read_bytes()).items():
        number, _, moment = name.partition(".")
        moments.setdefault(int(number), {})[moment] = tensor
    optimizer.load_state_dict(
        {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    history: list[dict[str, Any]] = json.loads((root / HISTORY_FILE).read_text(encoding="utf-8"))
    return history
