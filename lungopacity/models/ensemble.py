"""Several networks as one: each film is fetched and decoded once, and scored by all of them.

Tensor names carry their shape: B batch, H height, W width, F features of all members, concatenated,
M members, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import torch
from torch import nn
from torch.nn import functional

from lungopacity.models.ensemble_settings import EnsembleSettings
from lungopacity.models.networks import build_network


class Ensemble(nn.Module):
    """Takes x_B1HW, float32 from 0 to 1, at the largest member's image size. Returns logits_BK, the
    mean of the members' calibrated logits. Up to a constant, this is the mean of their calibrated
    log probabilities (a product of experts, Hinton 2002)."""

    def __init__(self, classes: int, settings: EnsembleSettings) -> None:
        super().__init__()
        self.settings = settings
        self.members = nn.ModuleList(
            build_network(member.architecture, classes, member.architecture_settings)
            for member in settings.members
        )

    def forward(self, x_B1HW: torch.Tensor) -> torch.Tensor:
        return self.classify(self.describe(x_B1HW))

    def describe(self, x_B1HW: torch.Tensor) -> torch.Tensor:
        """See `Network`."""
        inputs = self.member_inputs(x_B1HW)
        features = [
            network.describe(own_B1HW)  # type: ignore[operator]
            for network, own_B1HW in zip(self.members, inputs, strict=True)
        ]
        return torch.cat(features, dim=1)

    def member_inputs(self, x_B1HW: torch.Tensor) -> Iterator[torch.Tensor]:
        """Each member's input: resized to its image size, normalised as in its training."""
        for member in self.settings.members:
            own_B1HW = x_B1HW
            if x_B1HW.shape[-1] != member.image_size:
                own_B1HW = functional.interpolate(
                    x_B1HW, (member.image_size,) * 2, mode="bilinear", antialias=True
                )
            yield (own_B1HW - member.mean) / member.std

    def classify(self, features_BF: torch.Tensor) -> torch.Tensor:
        """See `Network`."""
        return self.member_logits(features_BF).mean(dim=0)

    def fused(self) -> Self:
        """Fuses the members that can be fused; see `CovNet.fused`."""
        for network in self.members:
            if hasattr(network, "fused"):
                network.fused()  # type: ignore[operator]
        return self

    def member_logits(self, features_BF: torch.Tensor) -> torch.Tensor:
        """logits_MBK, calibrated: the softmax over K gives each member's own probabilities."""
        widths = [member.features for member in self.settings.members]
        parts = torch.split(features_BF, widths, dim=1)
        each = []
        for network, member, part_BF in zip(
            self.members, self.settings.members, parts, strict=True
        ):
            logits_BK = network.classify(part_BF) / member.temperature  # type: ignore[operator]
            if member.class_biases is not None:
                logits_BK = logits_BK + logits_BK.new_tensor(list(member.class_biases))
            each.append(logits_BK)
        return torch.stack(each)
