"""How training updates the weights: the optimizer, and its learning rate at each step."""

from __future__ import annotations

import math
from typing import Any

import torch

from lungopacity.training.settings import TrainingSettings

_KEPT_FROM_COMPILER = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


class _Adam(torch.optim.Adam):
    """Adam that does not import torch's compiler, which takes more than a second of CPU time.

    torch's own imports it to keep these methods and the step from being compiled, and nothing here
    is compiled. In a release that does so in another way, it is imported.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        for name in _KEPT_FROM_COMPILER:
            method = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
            if method is not None:
                vars(method).setdefault("__dynamo_disable", method)
        super().__init__(*given, **named)

    # Without the wrapper that breaks the compiler's graph.
    step = torch.no_grad()(getattr(torch.optim.Adam.step, "__wrapped__", torch.optim.Adam.step))


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
    return _Adam(
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
