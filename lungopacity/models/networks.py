"""The networks by name. Every network takes x_B1HW, float32, normalised, and returns logits_BK."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from lungopacity.errors import UserError

if TYPE_CHECKING:
    import torch


class Network(Protocol):
    """What every network offers: `forward` is `classify` of `describe`."""

    def describe(self, x_B1HW: torch.Tensor) -> torch.Tensor:
        """features_BF: what the last layers decide on, and what else tells films from other
        pictures; see `TrainingDistribution`."""
        ...

    def classify(self, features_BF: torch.Tensor) -> torch.Tensor:
        """logits_BK."""
        ...


def _classical_cnn(classes: int, settings: Mapping[str, Any]) -> torch.nn.Module:
    from lungopacity.models.classical_cnn import ClassicalCNN, ClassicalCNNSettings

    return ClassicalCNN(classes, ClassicalCNNSettings(**settings))


_BUILDERS: dict[str, Callable[[int, Mapping[str, Any]], torch.nn.Module]] = {
    "classical-cnn": _classical_cnn,
}

NETWORK_NAMES = tuple(_BUILDERS)


def check_network(name: str) -> None:
    """Raises `UserError` for a name that is not in `NETWORK_NAMES`."""
    if name not in _BUILDERS:
        raise UserError(f"unknown model '{name}'; known: {', '.join(NETWORK_NAMES)}")


def build_network(
    name: str, classes: int, settings: Mapping[str, Any] | None = None
) -> torch.nn.Module:
    """A network with fresh weights, for `classes` classes.

    Raises `UserError` for an unknown name, `ValueError` for wrong settings.
    """
    check_network(name)
    return _BUILDERS[name](classes, settings or {})
