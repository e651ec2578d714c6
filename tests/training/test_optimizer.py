"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lungopacity.models import build_network
from lungopacity.training.optimizer import learning_rate_at, optimizer_of
from lungopacity.training.settings import TrainingSettings


def test_the_learning_rate_rises_evenly_and_falls_as_half_a_cosine() -> None:
    settings = TrainingSettings(learning_rate=0.4, warmup_fraction=0.2)
    told = [learning_rate_at(progress, settings) for progress in (0, 0.05, 0.1, 0.2, 0.6, 1)]
    assert told == pytest.approx([0, 0.1, 0.2, 0.4, 0.2, 0])
    assert learning_rate_at(0.4, settings) == pytest.approx(0.2 * (1 + math.sqrt(0.5)))
    assert learning_rate_at(0, replace(settings, warmup_fraction=0.0)) == 0.4


@pytest.mark.parametrize("kernels_only", [False, True])
def test_weight_decay_can_leave_biases_and_gains_as_they_are(kernels_only: bool) -> None:
    network = build_network("classical-cnn", 2, {"channels": (2,), "convolutions": (1,)})
    settings = TrainingSettings(weight_decay=0.1, decay_kernels_only=kernels_only)
    optimizer = optimizer_of(network, settings)
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    with torch.no_grad():
        for weight in network.parameters():
            weight.fill_(1.0)
            weight.grad = torch.zeros_like(weight)
    optimizer.step()
    kept = {name for name, weight in network.named_parameters() if bool((weight == 1.0).all())}
    vectors = {name for name, weight in network.named_parameters() if weight.ndim == 1}
    assert any(name.startswith("head") for name in vectors)
    assert any(name.startswith("features") and name.endswith("weight") for name in vectors)
    assert kept == (vectors if kernels_only else set())
    # By the rate times the decay, and not through Adam as part of the gradient.
    decayed = [weight for name, weight in network.named_parameters() if name not in kept]
    assert all(torch.allclose(weight, torch.tensor(0.9)) for weight in decayed)
