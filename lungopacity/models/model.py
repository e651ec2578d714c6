"""A trained model in memory: its weights, and everything else that determines a score."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lungopacity.models.distribution import (
    JointDistribution,
    TrainingDistribution,
    distribution_of_bytes,
)
from lungopacity.models.probabilities import calibrated_logits, softmax
from lungopacity.radiograph import Preprocessing

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OperatingPoint:
    """Turns the probability of the positive class, from 0 to 1, into a decision."""

    threshold: float
    """A probability at or above this is `positive`."""
    review_from: float | None = None
    """A probability at or above this, and below `threshold`, is `review`. None: no review band."""
    chosen_by: str = ""
    """The rule that chose the threshold, such as 'Youden J on validation'."""
    sensitivity: float | None = None
    """At `threshold`, on the images that it was chosen on; so is `specificity`."""
    specificity: float | None = None
    images: int | None = None
    """Number of images that it was chosen on."""
    by_view: Mapping[str, OperatingPoint] = field(default_factory=dict)
    """Points of their own for films whose headers state these views, such as PA. The thresholds
    above are for all other films."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold must be from 0 to 1, not {self.threshold}")
        if self.review_from is not None and not 0.0 <= self.review_from <= self.threshold:
            raise ValueError(f"review_from must be from 0 to the threshold, not {self.review_from}")

    def decide(self, probability: float, view: str | None = None) -> str:
        """Returns negative, review or positive. `view`: of the film, by its header; None if that
        does not state it. Raises `ValueError` for NaN."""
        if math.isnan(probability):
            raise ValueError("a probability that is not a number gives no decision")
        point = self.of_view(view)
        if probability >= point.threshold:
            return "positive"
        if point.review_from is not None and probability >= point.review_from:
            return "review"
        return "negative"

    def of_view(self, view: str | None) -> OperatingPoint:
        """The point whose thresholds decide about films of this view."""
        return self if view is None else self.by_view.get(view, self)

    @staticmethod
    def of(document: Mapping[str, Any]) -> OperatingPoint:
        """The inverse of `document_of`; further keys are ignored. Raises `AttributeError`,
        `TypeError` or `ValueError` for another document."""
        known = {
            name: document[name] for name in OperatingPoint.__dataclass_fields__ if name in document
        }
        views: Mapping[str, Any] = known.pop("by_view", {})
        return OperatingPoint(
            **known, by_view={view: OperatingPoint.of(point) for view, point in views.items()}
        )


@dataclass(frozen=True)
class ModelSpec:
    """The content of `model.json`, without its notice, format version and model id."""

    architecture: str
    """A name that `lungopacity.models.build_network` knows."""
    architecture_settings: Mapping[str, Any]
    class_names: tuple[str, ...]
    """In the order of the logits."""
    positive_class: str
    """The class whose probability the operating point applies to."""
    preprocessing: Preprocessing
    operating_point: OperatingPoint
    """The one that decides, unless another is chosen by name."""
    operating_points: Mapping[str, OperatingPoint] = field(default_factory=dict)
    """By name, which is the rule that chose the point, such as sensitivity=0.95."""
    label_map: Mapping[str, str] = field(default_factory=dict)
    """Label to class, where labels were merged or renamed."""
    temperature: float = 1.0
    """Logits are divided by this before the softmax (Guo et al. 2017)."""
    class_biases: tuple[float, ...] | None = None
    """Then added to the logits, one per class; None: no biases. See `calibrated_logits`."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """On the validation films, at the kept epoch."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Settings, data fingerprint and versions."""
    synthetic: bool = False
    """Whether it was trained on synthetic films: every output of the model says so."""

    def __post_init__(self) -> None:
        if len(self.class_names) < 2 or len(set(self.class_names)) < len(self.class_names):
            raise ValueError(f"class_names must be two or more different names: {self.class_names}")
        if self.positive_class not in self.class_names:
            raise ValueError(f"positive_class {self.positive_class!r} is not one of the classes")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        if self.class_biases is not None and len(self.class_biases) != len(self.class_names):
            raise ValueError(f"class_biases must be one number per class: {self.class_biases}")

    @property
    def class_of_label(self) -> dict[str, str]:
        """Label to class, of all labels: the class names themselves, and those in `label_map`."""
        return {name: name for name in self.class_names} | dict(self.label_map)

    @property
    def positive_index(self) -> int:
        return self.class_names.index(self.positive_class)

    @property
    def split_seed(self) -> int:
        """The seed by which training drew the splits of labels without any. In older folders it is
        the training's own seed."""
        seed = self.training.get("settings", {}).get("seed", 0)
        return int(self.training.get("data", {}).get("split_seed", seed))

    def calibrated(self, logits_NK: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Calibrates raw logits, (n, classes)."""
        return calibrated_logits(logits_NK, self.temperature, self.class_biases)

    def probabilities(self, logits_NK: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Calibrated class probabilities of raw logits, (n, classes); each row sums to 1."""
        return softmax(self.calibrated(logits_NK)).astype(np.float32)


@dataclass(frozen=True)
class TrainedModel:
    """A spec and its weights, as stored in a model folder. Ray pickles it for the workers."""

    spec: ModelSpec
    weights: bytes
    """The safetensors file."""
    distribution: bytes | None = None
    """The safetensors file of a `TrainingDistribution` or, for an ensemble, `JointDistribution`."""
    compiled: bytes | None = None
    """The network for CPUs, see `lungopacity.models.compiled`; None: CPUs run it in torch. Not part
    of the id: its scores equal torch's up to rounding."""

    @property
    def model_id(self) -> str:
        """A hash, 16 hex digits, of everything that can change a probability, a logit or an
        out-of-distribution score. It does not cover `positive_class`, the class that decisions,
        activation maps and an ensemble's disagreement are about."""
        preprocessing = asdict(self.spec.preprocessing)
        if not preprocessing["crop_borders"]:
            # Keeps the ids of folders older than this setting.
            del preprocessing["crop_borders"]
        decides = {
            "architecture": self.spec.architecture,
            "architecture_settings": dict(self.spec.architecture_settings),
            "class_names": self.spec.class_names,
            "preprocessing": preprocessing,
            "temperature": self.spec.temperature,
            "weights_sha256": sha256(self.weights),
        }
        if self.spec.class_biases is not None:
            decides["class_biases"] = self.spec.class_biases
        if self.distribution is not None:
            # It determines a flag of each film, for which the film may be rejected.
            decides["distribution_sha256"] = sha256(self.distribution)
        return sha256(json.dumps(decides, sort_keys=True).encode())[:16]

    def training_distribution(self) -> TrainingDistribution | JointDistribution | None:
        """The distribution of the training films' features; None for a folder of format 1."""
        if self.distribution is None:
            return None
        return distribution_of_bytes(self.distribution)

    def network(self) -> torch.nn.Module:
        """The network with its weights, in evaluation mode, on the CPU."""
        import safetensors.torch

        from lungopacity.models.networks import build_network

        network = build_network(
            self.spec.architecture, len(self.spec.class_names), self.spec.architecture_settings
        )
        load_weights(network, safetensors.torch.load(self.weights))
        return network.eval()


def document_of(value: OperatingPoint | ModelSpec) -> dict[str, Any]:
    """The fields as JSON keeps them. An empty `by_view` is left out: earlier versions read no
    folder with fields that they do not know."""
    return asdict(
        value,
        dict_factory=lambda items: {name: v for name, v in items if name != "by_view" or v},
    )


def weights_of(network: torch.nn.Module) -> bytes:
    """The network's parameters and buffers as a safetensors file."""
    import safetensors.torch

    state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})


def load_weights(
    network: torch.nn.Module, tensors: Mapping[str, torch.Tensor], *, strict: bool = True
) -> None:
    """Copies the tensors into the network's parameters and buffers. strict: as in torch's
    `load_state_dict`."""
    # The network's own state also has the versions of its layers. A safetensors file has none, and
    # torchvision's MNASNet loads nothing of unknown version.
    state = network.state_dict()
    state.clear()
    state.update(tensors)
    network.load_state_dict(state, strict=strict)


def sha256(data: bytes) -> str:
    """In hexadecimal, as `sha256sum` writes it."""
    return hashlib.sha256(data).hexdigest()
