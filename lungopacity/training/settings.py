"""What a training run is told. Their hash, with that of the data, names the run: see `fit`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lungopacity.radiograph import Preprocessing

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class AugmentationSettings:
    """How far a training film may be changed; each amount is drawn evenly from -limit to +limit."""

    rotation_degrees: float = 12.0
    """About the centre."""
    scale: float = 0.12
    """Relative change in size."""
    shift: float = 0.05
    """Of the film's side, in each direction."""
    gain: float = 0.15
    """Relative change in brightness. It multiplies, so that black stays black."""
    gamma: float = 0.2
    """Natural logarithm of the exponent; changes contrast as another exposure would."""
    flip_probability: float = 0.5
    """Share of films mirrored left to right: opacities have no side, even if the heart has one. Set
    it to 0 where the side matters."""

    def __post_init__(self) -> None:
        for name in ("rotation_degrees", "gamma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("scale", "shift", "gain"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, not {getattr(self, name)}")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability must be from 0 to 1, not {self.flip_probability}")


@dataclass(frozen=True)
class TrainingSettings:
    """One training run. The defaults are the recipe of the classical CNN."""

    model: str = "classical-cnn"
    """A name that `lungopacity.models.build_network` knows."""
    model_settings: Mapping[str, Any] = field(default_factory=dict)
    """What differs from that network's own defaults."""
    positive_class: str = "Lung_Opacity"
    """The class whose probability the operating point judges."""
    preprocessing: Preprocessing = Preprocessing()
    """How the films became pixels; carried into the model folder."""
    augmentation: AugmentationSettings = AugmentationSettings()
    """Random changes to the training films."""
    epochs: int = 22
    """Times that every training film is seen."""
    batch_size: int = 32
    """Films a step, over all workers together."""
    workers: int = 1
    """Processes that train together, one CPU or one GPU reserved for each."""
    use_gpu: bool = False
    """One GPU a worker."""
    seed: int = 0
    """Of everything drawn: first weights, order, augmentation, dropout."""
    learning_rate: float = 2e-3
    """Adam's, at the peak of the schedule."""
    warmup_fraction: float = 0.1
    """Share of all steps over which the learning rate rises to its peak, to fall as a cosine."""
    weight_decay: float = 0.05
    """Decoupled (Loshchilov & Hutter 2019), times the learning rate."""
    label_smoothing: float = 0.05
    """Probability that the training target gives away evenly (Szegedy et al. 2016)."""
    precision: str = "auto"
    """Of the forward and backward pass: float32, bfloat16, or auto: bfloat16 where it is fast."""
    patience: int = 0
    """Stop after so many epochs without a lower validation loss; 0: never."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("seed", "weight_decay", "patience"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("warmup_fraction", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, not {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")
        if self.batch_size % self.workers:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of workers ({self.workers})"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, not {self.precision!r}")

    def as_json(self) -> dict[str, Any]:
        """Every setting, in values that JSON has."""
        return {**asdict(self), "model_settings": dict(self.model_settings)}
