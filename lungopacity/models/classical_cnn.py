"""The classical CNN: blocks of convolution, ReLU and max pooling, then a dense softmax head.

After LeCun et al. 1998 (Gradient-Based Learning Applied to Document Recognition), with what has
become usual since: batch normalisation (Ioffe & Szegedy 2015), optionally several 3 x 3
convolutions per block (Simonyan & Zisserman 2015), and global pooling before the dense layers (Lin
et al. 2014), so that any input size fits. It returns logits; the loss applies the softmax in
training, and `Scorer.probabilities` afterwards.

Tensor names carry their shape: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lungopacity.models.kinds import check_kinds


@dataclass(frozen=True)
class ClassicalCNNSettings:
    """Shape of the network; stored in the model folder as `architecture_settings`."""

    channels: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Number of feature maps in each block; every block halves height and width."""
    convolutions: tuple[int, ...] = (1, 1, 1, 1, 1)
    """Number of 3 x 3 convolutions in each block."""
    batch_norm: bool = True
    """Normalise over the batch before each ReLU."""
    hidden_units: int = 0
    """Width of a dense layer between the pooled features and the softmax layer; 0: none."""
    dropout: float = 0.3
    """Share of the features that the last layer does not see during training."""

    def __post_init__(self) -> None:
        check_kinds(self)
        # JSON has no tuples: settings read from a model folder bring lists.
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "convolutions", tuple(self.convolutions))
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels must be one or more widths above 0, not {self.channels}")
        if len(self.convolutions) != len(self.channels) or min(self.convolutions) < 1:
            raise ValueError(
                f"convolutions must be a number above 0 for each of the {len(self.channels)} "
                f"blocks, not {self.convolutions}"
            )
        if self.hidden_units < 0:
            raise ValueError(f"hidden_units must be 0 or more, not {self.hidden_units}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be from 0 to below 1, not {self.dropout}")


class ClassicalCNN(nn.Module):
    """x_B1HW float32, normalised, any height and width, to logits_BK."""

    def __init__(self, classes: int, settings: ClassicalCNNSettings | None = None) -> None:
        super().__init__()
        self.settings = settings = settings or ClassicalCNNSettings()
        widths_in = (1, *settings.channels[:-1])
        self.features = nn.Sequential(
            *(
                _block(width_in, width, convolutions, settings.batch_norm)
                for width_in, width, convolutions in zip(
                    widths_in, settings.channels, settings.convolutions, strict=True
                )
            )
        )
        features = 2 * settings.channels[-1]
        head: list[nn.Module] = []
        if settings.hidden_units:
            head += [nn.Linear(features, settings.hidden_units), nn.ReLU(inplace=True)]
            features = settings.hidden_units
        self.head = nn.Sequential(*head, nn.Dropout(settings.dropout), nn.Linear(features, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_B1HW: torch.Tensor) -> torch.Tensor:
        return self.classify(self.describe(x_B1HW))

    def describe(self, x_B1HW: torch.Tensor) -> torch.Tensor:
        """See `Network`. In evaluation mode, the means of the earlier blocks come before the
        head's features: a photograph stands out in them, even after a minute of training."""
        maps_BCHW, earlier = x_B1HW, []
        for block in self.features:
            if not self.training and maps_BCHW is not x_B1HW:
                earlier.append(maps_BCHW.mean(dim=(2, 3)))
            maps_BCHW = block(maps_BCHW)
        # The mean tells how much of the lung is opaque, the maximum whether any spot is.
        last = [maps_BCHW.mean(dim=(2, 3)), maps_BCHW.amax(dim=(2, 3))]
        return torch.cat([*earlier, *last], dim=1)

    def classify(self, features_BF: torch.Tensor) -> torch.Tensor:
        """See `Network`."""
        logits_BK: torch.Tensor = self.head(features_BF[:, -2 * self.settings.channels[-1] :])
        return logits_BK


def _block(width_in: int, width: int, convolutions: int, batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number in range(1, convolutions + 1):
        # Batch normalisation would cancel a bias.
        layers.append(nn.Conv2d(width_in, width, 3, padding=1, bias=not batch_norm))
        if number == convolutions:
            # Pooling and ReLU commute. Pooling first leaves a quarter of the values to normalise,
            # which is 1.3 times as fast. ceil_mode keeps a map of one pixel: no input is too small.
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        if batch_norm:
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.ReLU(inplace=True))
        width_in = width
    return nn.Sequential(*layers)
