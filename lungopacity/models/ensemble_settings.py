"""What an ensemble is made of; importing this does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def member_prefix(number: int) -> str:
    """What the names of a member's arrays begin with, in each safetensors file of an ensemble."""
    return f"members.{number}."


@dataclass(frozen=True)
class EnsembleMember:
    """One of the networks, and how its logits count."""

    model_id: str
    """Of the folder that it came from."""
    architecture: str
    architecture_settings: Mapping[str, Any]
    image_size: int
    """Side of its input, pixels."""
    mean: float
    std: float
    """Its `Preprocessing`: grey values 0 … 1 less the mean, over the std."""
    temperature: float
    """Its logits are divided by it, so that each member counts by what it knows."""
    features: int
    """Width of what its `describe` returns."""
    class_biases: Sequence[float] | None = None
    """Added to its logits then, one a class; None: none."""


@dataclass(frozen=True)
class EnsembleSettings:
    """In the model folder as `architecture_settings`."""

    members: tuple[EnsembleMember, ...]

    def __post_init__(self) -> None:
        members = tuple(
            item if isinstance(item, EnsembleMember) else EnsembleMember(**item)
            for item in self.members
        )
        object.__setattr__(self, "members", members)
        if len(members) < 2:
            raise ValueError(f"members must be two or more, not {len(members)}")
