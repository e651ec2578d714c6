"""Published networks, as torchvision and timm build them, for one grey channel.

Tensor names carry their shape: B batch, H height, W width, F features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lungopacity.models.kinds import check_kinds


@dataclass(frozen=True)
class PublishedSettings:
    """Settings of a published network; in the model folder as `architecture_settings`."""

    dropout: float = 0.2
    """Share of the features that the last layer does not see during training."""
    drop_path: float = 0.0
    """Share of residual branches that training skips at the last block, fewer at earlier blocks
    (stochastic depth, Huang et al. 2016, arXiv:1603.09382); efficientnet-lite only."""
    image_size: int | None = None
    """Side of the input in pixels, for networks that accept only one size."""

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("dropout", "drop_path"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be from 0 to below 1, not {getattr(self, name)}")


class PublishedNetwork(nn.Module):
    """A body that computes features, and a dense head: x_B1HW float32 to logits_BK."""

    def __init__(self, body: nn.Module, features: int, classes: int, settings: PublishedSettings):
        super().__init__()
        self.settings = settings
        self.body = body
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Linear(features, classes)

    @classmethod
    def of_torchvision(
        cls, name: str, classes: int, settings: PublishedSettings
    ) -> PublishedNetwork:
        """One of torchvision's classifiers, by torchvision's name. Raises `ValueError` where its
        last layer cannot be replaced (true of none in torchvision 0.26), and for settings that
        would have no effect."""
        from torchvision import models

        if settings.drop_path:
            raise ValueError("drop_path is a setting of efficientnet-lite only; leave it out")
        options: dict[str, object] = {}
        if name in ("googlenet", "inception_v3"):
            options = {"aux_logits": False, "init_weights": True}
        if settings.image_size is not None:
            size = settings.image_size
            options = {"input_size": (size, size)} if name == "maxvit_t" else {"image_size": size}
        body = models.get_model(name, weights=None, **options)
        features = _behead(body)
        _see_grey(body)
        return cls(body, features, classes, settings)

    @classmethod
    def of_timm(cls, name: str, classes: int, settings: PublishedSettings) -> PublishedNetwork:
        """One of timm's classifiers, by timm's name. Raises `ValueError` for settings that would
        have no effect."""
        import timm

        if settings.image_size is not None:
            raise ValueError(f"{name} accepts any image size; use --image-size, not a setting")
        body = timm.create_model(name, in_chans=1, num_classes=0, drop_path_rate=settings.drop_path)
        return cls(body, body.num_features, classes, settings)

    def forward(self, x_B1HW: torch.Tensor) -> torch.Tensor:
        return self.classify(self.describe(x_B1HW))

    def describe(self, x_B1HW: torch.Tensor) -> torch.Tensor:
        """See `Network`."""
        features_BF: torch.Tensor = self.body(x_B1HW)
        return features_BF

    def classify(self, features_BF: torch.Tensor) -> torch.Tensor:
        """See `Network`."""
        logits_BK: torch.Tensor = self.head(self.dropout(features_BF))
        return logits_BK


def _behead(body: nn.Module) -> int:
    """Remove the layer that classifies ImageNet's classes; returns how many features it took."""
    named = [(name, part) for name, part in body.named_modules() if isinstance(part, nn.Linear)]
    if named:
        name, last = named[-1]
        body.set_submodule(name, nn.Identity())
        return last.in_features
    # SqueezeNet ends in a 1 x 1 convolution followed by pooling.
    classifier = getattr(body, "classifier", None)
    convolutions = [part for part in body.modules() if isinstance(part, nn.Conv2d)]
    if not isinstance(classifier, nn.Sequential) or convolutions[-1] not in list(classifier):
        raise ValueError("the network's last layer is not one that can be replaced")
    body.set_submodule("classifier", nn.AdaptiveAvgPool2d(1))
    return convolutions[-1].in_channels


def _see_grey(body: nn.Module) -> None:
    """Give the first layer a single input channel: three copies of a film carry no more."""
    name, first = next(
        (name, part)
        for name, part in body.named_modules()
        if isinstance(part, nn.Conv2d) and part.in_channels == 3
    )
    grey = nn.Conv2d(
        1,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    body.set_submodule(name, grey)
