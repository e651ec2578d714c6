"""Where on a film a network sees the positive class: Grad-CAM (Selvaraju et al. 2017,
arXiv:1610.02391).

Of each of the last feature maps A_k, the mean over its places of the decision's gradient says how
much it speaks for the class; the map is the ReLU of their sum, so weighted. The decision is the log
odds of the positive class, its logit less the log-sum-exp of the others: the softmax depends on
differences of logits alone, so one logit by itself may stand still while the probability moves.

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
"""Their output may have more places than what they were given (AlexNet's on small inputs)."""


@dataclass(frozen=True)
class _Target:
    """The output of a module that is explained."""

    module: nn.Module
    call: int
    """Which of its calls in one forward pass, from 1."""
    grid: tuple[int, int] | None = None
    """h and w of tokens_BTC, which may begin with a class token; None for maps_BChw."""


class GradCAM:
    """Class activation maps of one network at one size of input.

    The target is found, not named: in a first pass, the last output of a module that has more than
    one place (of the classical CNN its last block, of a residual network the sum behind its last
    block). Swin and MaxViT end in such maps; of a vision transformer it is what the last
    attention is given (behind that, only the class token matters).
    """

    def __init__(
        self,
        network: nn.Module,
        positive: int,
        image_size: int,
        temperature: float = 1.0,
        class_biases: Sequence[float] | None = None,
    ) -> None:
        """network: in evaluation mode; none of its parameters asks for gradients any more.
        positive: index of the class. `temperature`, `class_biases`: see `calibrated_logits`; of
        more than two classes they decide which others the class is held against. Raises `UserError`
        where no output has places."""
        self.network = network.requires_grad_(False)
        self.positive = positive
        self.temperature = temperature
        device = next(network.parameters()).device
        self.biases_K = torch.tensor(class_biases or 0.0, device=device)
        self.target = _find_target(network, torch.zeros(1, 1, image_size, image_size).to(device))

    @torch.enable_grad()
    def maps(self, x_B1HW: torch.Tensor) -> torch.Tensor:
        """map_BHW, float32, 0 … 1: the highest place of each film is 1, and all are 0 where nothing
        speaks for the class. x_B1HW: as the network takes it."""
        with _taken(self.target) as taken:
            logits_BK = self.network(x_B1HW)
        # In-place layers behind the target change the tensor itself, and autograd follows: value
        # and gradient are both of what is behind them.
        (found,) = taken
        # Films do not mix in evaluation mode: the gradient of the sum is each film's own.
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
    """Each map over its highest value; a map of zeros stays one."""
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
        "the network ends in no feature maps whose places are places of the film, which Grad-CAM "
        f"needs (input of {x_11HW.shape[-1]} pixels); explain a convolutional network"
    )


@contextmanager
def _taken(target: _Target) -> Iterator[list[torch.Tensor]]:
    """The target's output in the forward pass of the block, from where on gradients are kept: no
    layer before it is passed backward."""
    taken: list[torch.Tensor] = []
    calls = 0

    def take(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        nonlocal calls
        calls += 1
        if calls != target.call:
            return None
        # A copy that is no leaf: in-place layers may change it.
        taken.append(output.detach().requires_grad_().clone())
        return taken[0]

    hook = target.module.register_forward_hook(take)
    try:
        yield taken
    finally:
        hook.remove()


def _as_maps(tokens_BTC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """maps_BChw of the tokens that have a place; a class token at their beginning has none."""
    h, w = grid
    placed_BCT = tokens_BTC[:, -h * w :].transpose(1, 2)
    return placed_BCT.reshape(*placed_BCT.shape[:2], h, w)
