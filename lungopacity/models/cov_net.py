"""Cov-Net, after Li, Zeng, Wu & Clawson 2022 (doi:10.1016/j.eswa.2022.118029).

The paper has three ideas. Asymmetric convolutions run parallel to each square convolution of a
residual network (Ding et al. 2019, arXiv:1908.03930). Each residual block has attention. Dilated
convolutions of increasing rates follow the residual blocks, each of which sees the output of all
those before it, to fuse high with low levels. Where the paper leaves a choice open: the residual
blocks are ResNet-18's (He et al. 2016), the attention is squeeze-and-excitation (Hu et al. 2018,
arXiv:1709.01507), and the rates are 1, 2, 4.

For evaluation, `CovNet.fused` adds the three parallel kernels into one.

Tensor names carry their shape: B batch, C channels, H height, W width, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn
from torch.nn import functional

from lungopacity.models.kinds import check_kinds


@dataclass(frozen=True)
class CovNetSettings:
    """Shape of the network; stored in the model folder as `architecture_settings`."""

    channels: tuple[int, ...] = (32, 64, 128, 256)
    """Number of feature maps in each stage; every stage but the first halves height and width."""
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """Number of residual blocks in each stage."""
    dilations: tuple[int, ...] = (1, 2, 4)
    """Rates of the dilated convolutions that follow the stages."""
    squeeze: int = 8
    """The attention reduces its number of channels by this factor."""
    dropout: float = 0.2
    """Share of the features that the last layer does not see during training."""

    def __post_init__(self) -> None:
        check_kinds(self)
        # JSON has no tuples: settings read from a model folder bring lists.
        for name in ("channels", "blocks", "dilations"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be numbers above 0, not {getattr(self, name)}")
        if len(self.blocks) != len(self.channels):
            raise ValueError(f"blocks must be a number for each of {len(self.channels)} stages")
        if self.squeeze < 1:
            raise ValueError(f"squeeze must be 1 or more, not {self.squeeze}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be from 0 to below 1, not {self.dropout}")


class CovNet(nn.Module):
    """x_B1HW float32, normalised, any height and width, to logits_BK."""

    def __init__(self, classes: int, settings: CovNetSettings | None = None) -> None:
        super().__init__()
        self.settings = settings = settings or CovNetSettings()
        width = settings.channels[0]
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        blocks: list[nn.Module] = []
        for stage, (channels, count) in enumerate(
            zip(settings.channels, settings.blocks, strict=True)
        ):
            for number in range(count):
                stride = 2 if stage and not number else 1
                blocks.append(_ResidualBlock(width, channels, stride, settings.squeeze))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.fusion = _DilatedFusion(width, settings.dilations)
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, x_B1HW: torch.Tensor) -> torch.Tensor:
        return self.classify(self.describe(x_B1HW))

    def describe(self, x_B1HW: torch.Tensor) -> torch.Tensor:
        """See `Network`."""
        maps_BCHW: torch.Tensor = self.fusion(self.blocks(self.stem(x_B1HW)))
        return maps_BCHW.mean(dim=(2, 3))

    def classify(self, features_BF: torch.Tensor) -> torch.Tensor:
        """See `Network`."""
        logits_BK: torch.Tensor = self.head(self.dropout(features_BF))
        return logits_BK

    def fused(self) -> Self:
        """Replaces each three parallel kernels by one that computes the same.

        Changes this network, which must be in evaluation mode: its running statistics become part
        of the kernels (Ding et al. 2019, section 3.3).
        """
        assert not self.training
        for name, part in list(self.named_modules()):
            if isinstance(part, _AsymmetricConvolution):
                self.set_submodule(name, part.fused())
        return self


class _AsymmetricConvolution(nn.Module):
    """Parallel 3 x 3, 3 x 1 and 1 x 3 convolutions, each normalised, then summed."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.shape = (width_in, width, stride)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(
                    width_in,
                    width,
                    (height, breadth),
                    stride,
                    (height // 2, breadth // 2),
                    bias=False,
                ),
                nn.BatchNorm2d(width),
            )
            for height, breadth in ((3, 3), (3, 1), (1, 3))
        )

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        square, upright, flat = (branch(x_BCHW) for branch in self.branches)
        maps_BCHW: torch.Tensor = square + upright + flat
        return maps_BCHW

    @torch.no_grad()
    def fused(self) -> nn.Conv2d:
        """A single 3 x 3 convolution that computes the same in evaluation mode."""
        width_in, width, stride = self.shape
        one = nn.Conv2d(width_in, width, 3, stride, padding=1)
        assert one.bias is not None
        one.weight.zero_()
        one.bias.zero_()
        for branch in self.branches:
            convolution, norm = branch[0], branch[1]  # type: ignore[index]
            gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            kernel = convolution.weight * gain[:, None, None, None]
            # A kernel of one row or column belongs in the middle of the square one.
            above, beside = (3 - kernel.shape[2]) // 2, (3 - kernel.shape[3]) // 2
            one.weight += functional.pad(kernel, (beside, beside, above, above))
            one.bias += norm.bias - norm.running_mean * gain
        return one.eval()


class _ResidualBlock(nn.Module):
    """Two asymmetric convolutions with channel attention, and a shortcut around them."""

    def __init__(self, width_in: int, width: int, stride: int, squeeze: int) -> None:
        super().__init__()
        self.first = _AsymmetricConvolution(width_in, width, stride)
        self.second = _AsymmetricConvolution(width, width, 1)
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, max(1, width // squeeze), 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(max(1, width // squeeze), width, 1),
            nn.Sigmoid(),
        )
        self.past: nn.Module = nn.Identity()
        if stride > 1 or width_in != width:
            self.past = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        maps_BCHW = self.second(functional.relu(self.first(x_BCHW)))
        return functional.relu(maps_BCHW * self.attention(maps_BCHW) + self.past(x_BCHW))


class _DilatedFusion(nn.Module):
    """Successive dilated convolutions, each adding to its input."""

    def __init__(self, width: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.rates = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=rate, dilation=rate, bias=False),
                nn.BatchNorm2d(width),
            )
            for rate in dilations
        )

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        for rate in self.rates:
            x_BCHW = functional.relu(x_BCHW + rate(x_BCHW))
        return x_BCHW
