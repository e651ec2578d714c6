"""The networks by name. Every network takes x_B1HW, float32, normalised, and returns logits_BK.

Importing this module does not import torch, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lungopacity.errors import UserError, first_line
from lungopacity.radiograph import Preprocessing

if TYPE_CHECKING:
    import torch

TORCHVISION = "torchvision:"
"""Prefix that names any other classifier of torchvision, such as torchvision:convnext_tiny."""

ENSEMBLE = "ensemble"
"""Name of an ensemble, which `lungopacity ensemble` makes of trained networks."""
ENSEMBLE_MADE = (
    "averages models that are already trained; "
    "`lungopacity ensemble --model FIRST --model SECOND --output BOTH` makes one"
)
"""Explains an ensemble where the networks that can be trained are listed."""

IMAGENET_GREY_MEAN, IMAGENET_GREY_STD = 0.449, 0.226
"""ImageNet's usual mean and standard deviation, each averaged over red, green and blue."""


class Network(Protocol):
    """The interface of every network: `forward` applies `classify` to the output of `describe`.

    The last layer, and nothing else, is named `head`; the classical CNN's hidden layer is part of
    it. Where first weights are of other classes, tensors of `head` that do not fit stay fresh.
    `settings`: the dataclass from which the network can be built again.
    """

    settings: Any

    def describe(self, x_B1HW: torch.Tensor) -> torch.Tensor:
        """features_BF: the input of `classify`. It may include features that only help to tell
        films from other pictures; see `TrainingDistribution`."""
        ...

    def classify(self, features_BF: torch.Tensor) -> torch.Tensor:
        """logits_BK."""
        ...


@dataclass(frozen=True)
class NetworkCard:
    """What is known about a network before it is built."""

    name: str
    source: str
    """The paper."""
    image_size: int
    """Side of the input that it was designed for, in pixels; for torchvision's other classifiers,
    the side that their published weights were evaluated at."""
    build: Callable[[int, Mapping[str, Any]], torch.nn.Module]
    """Builds it with fresh weights, from the number of classes and its settings."""
    backbone: str | None = None
    """Its name in torchvision or timm; None for networks that are written here."""
    weights: str | None = None
    """Where its ImageNet weights come from: `installed`, `download`, or None: there are none."""
    fixed_size: bool = False
    """It accepts inputs of one size only, which is one of its settings."""

    @property
    def preprocessing(self) -> Preprocessing:
        """The recipe's preprocessing, unless the user chooses another size."""
        grey = {"mean": IMAGENET_GREY_MEAN, "std": IMAGENET_GREY_STD} if self.backbone else {}
        return Preprocessing(self.image_size, crop_borders=True, **grey)


def _classical_cnn(classes: int, settings: Mapping[str, Any]) -> torch.nn.Module:
    from lungopacity.models.classical_cnn import ClassicalCNN, ClassicalCNNSettings

    return ClassicalCNN(classes, ClassicalCNNSettings(**settings))


def _cov_net(classes: int, settings: Mapping[str, Any]) -> torch.nn.Module:
    from lungopacity.models.cov_net import CovNet, CovNetSettings

    return CovNet(classes, CovNetSettings(**settings))


def _ensemble(classes: int, settings: Mapping[str, Any]) -> torch.nn.Module:
    from lungopacity.models.ensemble import Ensemble
    from lungopacity.models.ensemble_settings import EnsembleSettings

    return Ensemble(classes, EnsembleSettings(**settings))


def _torchvision(backbone: str) -> Callable[[int, Mapping[str, Any]], torch.nn.Module]:
    def build(classes: int, settings: Mapping[str, Any]) -> torch.nn.Module:
        from lungopacity.models.published import PublishedNetwork, PublishedSettings

        return PublishedNetwork.of_torchvision(backbone, classes, PublishedSettings(**settings))

    return build


def _timm(backbone: str) -> Callable[[int, Mapping[str, Any]], torch.nn.Module]:
    def build(classes: int, settings: Mapping[str, Any]) -> torch.nn.Module:
        from lungopacity.models.published import PublishedNetwork, PublishedSettings

        return PublishedNetwork.of_timm(backbone, classes, PublishedSettings(**settings))

    return build


def _efficientnet_lite(number: int, image_size: int) -> NetworkCard:
    name, backbone = f"efficientnet-lite{number}", f"tf_efficientnet_lite{number}"
    source = "Tan & Le 2019, arXiv:1905.11946; Lite: Liu 2020, TensorFlow blog, 16 March"
    return NetworkCard(name, source, image_size, _timm(backbone), backbone, "installed")


_CARDS = {
    card.name: card
    for card in (
        NetworkCard(
            "classical-cnn", "LeCun et al. 1998, Proc. IEEE 86(11); the paper", 160, _classical_cnn
        ),
        NetworkCard(
            "alexnet",
            "Krizhevsky 2014, arXiv:1404.5997; Senan et al. 2021",
            224,
            _torchvision("alexnet"),
            "alexnet",
            "download",
        ),
        NetworkCard(
            "resnet-50",
            "He et al. 2016, arXiv:1512.03385; Senan et al. 2021",
            224,
            _torchvision("resnet50"),
            "resnet50",
            "download",
        ),
        NetworkCard("cov-net", "Li et al. 2022, doi:10.1016/j.eswa.2022.118029", 224, _cov_net),
        NetworkCard(
            "densenet-121",
            "Huang et al. 2017, arXiv:1608.06993; CheXNet: Rajpurkar et al. 2017, arXiv:1711.05225",
            224,
            _torchvision("densenet121"),
            "densenet121",
            "download",
        ),
        _efficientnet_lite(0, 224),
        _efficientnet_lite(1, 240),
        _efficientnet_lite(2, 260),
    )
}

NETWORK_NAMES = tuple(_CARDS)


def network_card(name: str) -> NetworkCard:
    """The card of a name in `NETWORK_NAMES`, or of torchvision:NAME. Raises `UserError` for any
    other name, and for an ensemble."""
    if name in _CARDS:
        return _CARDS[name]
    if name == ENSEMBLE:
        raise UserError(f"model '{ENSEMBLE}' is not trained: it {ENSEMBLE_MADE}")
    known = f"known: {', '.join(NETWORK_NAMES)}, and {TORCHVISION}NAME"
    if not name.startswith(TORCHVISION):
        raise UserError(f"unknown model '{name}'; {known}")
    from torchvision import models

    backbone = name.removeprefix(TORCHVISION)
    if backbone not in models.list_models(module=models):
        raise UserError(
            f"unknown model '{name}': torchvision has no classifier of that name; its "
            "documentation lists them"
        )
    (side,) = models.get_model_weights(backbone).DEFAULT.transforms().crop_size
    return NetworkCard(
        name,
        "torchvision",
        side,
        _torchvision(backbone),
        backbone,
        "download",
        # These transformers fix their positions or windows when they are built.
        fixed_size=backbone.startswith(("vit_", "maxvit")),
    )


def check_network(name: str) -> None:
    """Raises `UserError` for a name that `network_card` does not know."""
    network_card(name)


def build_network(
    name: str, classes: int, settings: Mapping[str, Any] | None = None
) -> torch.nn.Module:
    """Builds a network with fresh weights, for `classes` classes.

    Raises `UserError` for an unknown name, `ValueError` for wrong settings.
    """
    build = _ensemble if name == ENSEMBLE else network_card(name).build
    try:
        return build(classes, settings or {})
    except TypeError as error:
        _, unknown, setting = str(error).partition("unexpected keyword argument ")
        # From Python 3.13 on, a question may follow the name.
        setting, _, _ = setting.partition(". Did you mean")
        why = f"{name} has no setting {setting}" if unknown else f"settings of {name}: {error}"
        raise ValueError(why) from error


def settings_of_network(
    name: str, classes: int, settings: Mapping[str, Any], image_size: int | None = None
) -> Any:
    """All settings of a network, found by building it without allocating its weights; None for
    torchvision's regnets, which cannot be built so.

    image_size: None, or the side of an input to try. Raises `UserError` for an unknown name,
    `ValueError` with a one-line message for wrong settings, or for an input that it cannot take.
    """
    import torch

    try:
        with torch.device("meta"):
            network = build_network(name, classes, settings)
            if image_size is not None:
                network(torch.zeros(2, 1, image_size, image_size))
            return network.settings
    except NotImplementedError:
        return None  # regnets; the only settings they take were checked before this was raised
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(first_line(error)) from error
