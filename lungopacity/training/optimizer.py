"""How training updates the weights: the optimizer, and its learning rate at each step."""

from __future__ import annotations

import math
from typing import Any

import torch

from lungopacity.training.settings import TrainingSettings


def optimizer_of(network: torch.nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""
    weights = list(network.parameters())
    groups: list[dict[str, Any]] = [{"params": weights}]
    if settings.decay_kernels_only:
        # Biases and normalisation gains have one dimension.
        groups = [
            {"params": [weight for weight in weights if weight.ndim > 1]},
            {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
        ]
    return torch.optim.Adam(
        groups, betas=(0.9, 0.99), weight_decay=settings.weight_decay, decoupled_weight_decay=True
    )


def learning_rate_at(progress: float, settings: TrainingSettings) -> float:
    """Linear warm-up to the peak, then half a cosine to zero (Loshchilov & Hutter 2017).

    progress: share of all steps that are done, from 0 to 1.
    """
    if progress < settings.warmup_fraction:
        return settings.learning_rate * progress / settings.warmup_fraction
    annealed = (progress - settings.warmup_fraction) / (1 - settings.warmup_fraction)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * annealed))
