"""A trained model as it is in memory: its weights, and all else that decides a score."""

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
    """Where a score becomes a decision. Probabilities are of the positive class, 0 … 1."""

    threshold: float
    """At or above: `positive`."""
    review_from: float | None = None
    """At or above, and below `threshold`: `review`. None: no review band."""
    chosen_by: str = ""
    """The rule, as in 'Youden J on validation'."""
    sensitivity: float | None = None
    """At `threshold`, on the images it was chosen on."""
    specificity: float | None = None
    images: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold must be from 0 to 1, not {self.threshold}")
        if self.review_from is not None and not 0.0 <= self.review_from <= self.threshold:
            raise ValueError(f"review_from must be from 0 to the threshold, not {self.review_from}")

    def decide(self, probability: float) -> str:
        """negative, review or positive. Raises `ValueError` for NaN, which is none of them."""
        if math.isnan(probability):
            raise ValueError("a probability that is no number decides nothing")
        if probability >= self.threshold:
            return "positive"
        if self.review_from is not None and probability >= self.review_from:
            return "review"
        return "negative"


@dataclass(frozen=True)
class ModelSpec:
    """All of `model.json` but the hashes."""

    architecture: str
    """A name that `lungopacity.models.build_network` knows."""
    architecture_settings: Mapping[str, Any]
    class_names: tuple[str, ...]
    """In the order of the logits."""
    positive_class: str
    """The class whose probability the operating point judges."""
    preprocessing: Preprocessing
    operating_point: OperatingPoint
    """Decides, unless another is asked for by name."""
    operating_points: Mapping[str, OperatingPoint] = field(default_factory=dict)
    """By name: the rules that chose them, as sensitivity=0.95."""
    label_map: Mapping[str, str] = field(default_factory=dict)
    """Label to class, where labels were merged or renamed."""
    temperature: float = 1.0
    """Logits are divided by it before the softmax (Guo et al. 2017)."""
    class_biases: tuple[float, ...] | None = None
    """Added then, one a class; None: none. See `calibrated_logits`."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """On validation, at the kept epoch."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Settings, data fingerprint and versions."""
    synthetic: bool = False
    """Trained on phantoms: every output of the model says so."""

    def __post_init__(self) -> None:
        if len(self.class_names) < 2 or len(set(self.class_names)) < len(self.class_names):
            raise ValueError(f"class_names must be two or more different names: {self.class_names}")
        if self.positive_class not in self.class_names:
            raise ValueError(f"positive_class {self.positive_class!r} is none of the class names")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        if self.class_biases is not None and len(self.class_biases) != len(self.class_names):
            raise ValueError(f"class_biases must be one a class: {self.class_biases}")

    @property
    def class_of_label(self) -> dict[str, str]:
        """Of every label that means a class: its own name, and those that were merged into it."""
        return {name: name for name in self.class_names} | dict(self.label_map)

    @property
    def positive_index(self) -> int:
        return self.class_names.index(self.positive_class)

    @property
    def split_seed(self) -> int:
        """By which training split films whose labels have no split: in older folders the seed of
        all else that training drew."""
        drawn = self.training.get("settings", {}).get("seed", 0)
        return int(self.training.get("data", {}).get("split_seed", drawn))

    def calibrated(self, logits_NK: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """(n, classes) raw logits, calibrated."""
        return calibrated_logits(logits_NK, self.temperature, self.class_biases)

    def probabilities(self, logits_NK: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Calibrated class probabilities of (n, classes) raw logits: rows sum to 1."""
        return softmax(self.calibrated(logits_NK)).astype(np.float32)


@dataclass(frozen=True)
class TrainedModel:
    """A spec with its weights, as they lie in a folder. Ray carries it to the workers by pickle."""

    spec: ModelSpec
    weights: bytes
    """The safetensors file."""
    distribution: bytes | None = None
    """Of `TrainingDistribution`, or of an ensemble's `JointDistribution`, another."""
    compiled: bytes | None = None
    """See `lungopacity.models.compiled`; None: CPUs run the network in torch, too. Not in the id:
    its scores are torch's but for rounding."""

    @property
    def model_id(self) -> str:
        """16 hex digits over everything that can change a probability, a logit or an
        out-of-distribution score. Not over `positive_class`, which decides what an ensemble's
        disagreement, a decision and an activation map are of."""
        preprocessing = asdict(self.spec.preprocessing)
        if not preprocessing["crop_borders"]:
            # Folders of before there was a choice keep their ids.
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
            # It decides a flag of each film, and may reject it.
            decides["distribution_sha256"] = sha256(self.distribution)
        return sha256(json.dumps(decides, sort_keys=True).encode())[:16]

    def training_distribution(self) -> TrainingDistribution | JointDistribution | None:
        """Where the training films lie; None for a folder of format 1."""
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
        network.load_state_dict(safetensors.torch.load(self.weights))
        return network.eval()


def weights_of(network: torch.nn.Module) -> bytes:
    """The network's parameters and buffers as a safetensors file."""
    import safetensors.torch

    state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})


def sha256(data: bytes) -> str:
    """In hexadecimal, as `sha256sum` writes it."""
    return hashlib.sha256(data).hexdigest()
