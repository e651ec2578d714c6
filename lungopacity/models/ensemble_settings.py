"""The members of an ensemble. Importing this does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def member_prefix(number: int) -> str:
    """Prefix of the names of a member's arrays, in each safetensors file of an ensemble."""
    return f"members.{number}."


@dataclass(frozen=True)
class EnsembleMember:
    """One of the networks, and how its logits are calibrated."""

    model_id: str
    """Id of the model folder that it came from."""
    architecture: str
    architecture_settings: Mapping[str, Any]
    image_size: int
    """Side of its input, in pixels."""
    mean: float
    std: float
    """From its `Preprocessing`: its input is (x - mean) / std, of grey values x from 0 to 1."""
    temperature: float
    """Its logits are divided by this, so that no member outweighs others by being overconfident."""
    features: int
    """Number of features that its `describe` returns."""
    class_biases: Sequence[float] | None = None
    """Then added to its logits, one per class; None: no biases."""


@dataclass(frozen=True)
class EnsembleSettings:
    """All members; in the model folder as `architecture_settings`."""

    members: tuple[EnsembleMember, ...]

    def __post_init__(self) -> None:
        members = tuple(
            item if isinstance(item, EnsembleMember) else EnsembleMember(**item)
            for item in self.members
        )
        object.__setattr__(self, "members", members)
        if len(members) < 2:
            raise ValueError(f"members must be two or more, not {len(members)}")
