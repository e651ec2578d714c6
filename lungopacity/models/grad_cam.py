"""Where on a film a network sees the positive class: Grad-CAM (Selvaraju et al. 2017,
arXiv:1610.02391).

The weight of each of the last feature maps is the gradient of the score with respect to it,
averaged over its positions. The activation map is the ReLU of the weighted sum. The score is the
log odds of the positive class: its logit minus the log-sum-exp of the others. The softmax depends
only on differences of logits, so a single logit may stand still while the probability changes.

Tensor names carry their shape: B batch, C channels, H height, W width, h and w those of the feature
maps, T tokens, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lungopacity.errors import UserError

_RESAMPLING = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample)
"""Layers that may output more positions than their input has (AlexNet's pooling of small films)."""


@dataclass(frozen=True)
class _Target:
    """The module output that the activation map is computed from."""

    module: nn.Module
    call: int
    """Which of the module's calls in a forward pass, counted from 1."""
    grid: tuple[int, int] | None = None
    """h and w of tokens_BTC, which may begin with a class token; None for maps_BChw."""


class GradCAM:
    """Class activation maps of one network at one input size.

    A first forward pass finds the target: the last module output that has more than one position.
    In the classical CNN this is the last block, in a residual network the sum at the end of its
    last block; Swin and MaxViT end in such maps, too. In a vision transformer it is the input of
    the last attention layer, after which only the class token matters.
    """

    def __init__(
        self,
        network: nn.Module,
        positive: int,
        image_size: int,
        temperature: float = 1.0,
        class_biases: Sequence[float] | None = None,
    ) -> None:
        """network: in evaluation mode; its parameters no longer require gradients afterwards.
        positive: index of the class. `temperature`, `class_biases`: see `calibrated_logits`; with
        more than two classes they change how much each other class counts in the log odds. Raises
        `UserError` where no suitable target is found."""
        self.network = network.requires_grad_(False)
        self.positive = positive
        self.temperature = temperature
        device = next(network.parameters()).device
        self.biases_K = torch.tensor(class_biases or 0.0, device=device)
        self.target = _find_target(network, torch.zeros(1, 1, image_size, image_size).to(device))

    @torch.enable_grad()
    def maps(self, x_B1HW: torch.Tensor) -> torch.Tensor:
        """map_BHW, float32 from 0 to 1. The highest position of each film is 1; a film in which
        nothing supports the class is all 0. x_B1HW: the network's input."""
        with _taken(self.target) as taken:
            logits_BK = self.network(x_B1HW)
        # In-place layers after the target change this very tensor, and autograd tracks that: value
        # and gradient both belong to the output of those layers.
        (found,) = taken
        # In evaluation mode films do not affect each other: the gradient of the sum holds each
        # film's own gradient.
        calibrated_BK = logits_BK / self.temperature + self.biases_K
        (gradient,) = torch.autograd.grad(log_odds(calibrated_BK, self.positive).sum(), found)
        found, gradient = found.detach().float(), gradient.float()
        if self.target.grid is not None:
            found, gradient = (_as_maps(part, self.target.grid) for part in (found, gradient))
        weights_BC11 = gradient.mean(dim=(2, 3), keepdim=True)
        map_B1hw = functional.relu((weights_BC11 * found).sum(dim=1, keepdim=True))
        size = x_B1HW.shape[-2:]
        map_BHW = functional.interpolate(map_B1hw, size, mode="bilinear").squeeze(1)
        return of_highest(map_BHW)


def log_odds(logits_BK: torch.Tensor, positive: int) -> torch.Tensor:
    """log(p / (1 - p)) of the softmax probability p of class `positive`, (B,)."""
    others = [index for index in range(logits_BK.shape[1]) if index != positive]
    return logits_BK[:, positive] - logits_BK[:, others].logsumexp(dim=1)


def of_highest(map_BHW: torch.Tensor) -> torch.Tensor:
    """Divides each map by its highest value; a map of zeros is returned as it is."""
    highest_B11 = map_BHW.amax(dim=(1, 2), keepdim=True)
    return torch.where(highest_B11 > 0, map_BHW / highest_B11, 0.0)


@torch.no_grad()
def _find_target(network: nn.Module, x_11HW: torch.Tensor) -> _Target:
    calls: dict[nn.Module, int] = {}
    maps: _Target | None = None
    tokens: list[tuple[_Target, int]] = []
    before_attention: _Target | None = None
    grid = (0, 0)

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal maps, grid, before_attention
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, nn.MultiheadAttention):
            before_attention = tokens[-1][0] if tokens else None
        elif not isinstance(output, torch.Tensor) or isinstance(module, _RESAMPLING):
            return
        elif output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
            maps, grid = _Target(module, calls[module]), (output.shape[2], output.shape[3])
            tokens.clear()
        elif output.ndim == 3 and maps is not None:
            tokens.append((_Target(module, calls[module], grid), output.shape[1]))

    hooks = [module.register_forward_hook(note) for module in network.modules()]
    try:
        network(x_11HW)
    finally:
        for hook in hooks:
            hook.remove()
    if not tokens and maps is not None:
        return maps
    if before_attention is not None and tokens[-1][1] == grid[0] * grid[1] + 1:
        return before_attention
    raise UserError(
        "Grad-CAM needs feature maps whose positions correspond to positions on the film; this "
        f"network has none (input of {x_11HW.shape[-1]} pixels); explain a convolutional network"
    )


@contextmanager
def _taken(target: _Target) -> Iterator[list[torch.Tensor]]:
    """Yields a list that receives the target's output in the block's forward pass. Gradients are
    tracked from there on only, so the backward pass stops at the target."""
    taken: list[torch.Tensor] = []
    calls = 0

    def take(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        nonlocal calls
        calls += 1
        if calls != target.call:
            return None
        # Cloned, because in-place layers may not change a leaf tensor.
        taken.append(output.detach().requires_grad_().clone())
        return taken[0]

    hook = target.module.register_forward_hook(take)
    try:
        yield taken
    finally:
        hook.remove()


def _as_maps(tokens_BTC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """maps_BChw of the tokens, without a class token at the beginning, which has no position."""
    h, w = grid
    placed_BCT = tokens_BTC[:, -h * w :].transpose(1, 2)
    return placed_BCT.reshape(*placed_BCT.shape[:2], h, w)
