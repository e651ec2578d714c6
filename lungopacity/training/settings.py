"""The settings of a training run. Their hash, with that of the data, names the run: see `fit`."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from lungopacity.models import network_card
from lungopacity.radiograph import Preprocessing
from lungopacity.words import counted

TRAINING_PRECISIONS = ("auto", "float32", "bfloat16")
BALANCES = ("none", "weights", "sampling")
_KINDS = {
    int: "a whole number, such as 3",
    float: "a number, such as 0.5 or 1e-3",
    bool: "true or false",
}
"""What a word for a value of that type must be. It is JSON, which has no .5 and no True."""


def _check_finite(settings: Any) -> None:
    for name, value in vars(settings).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, not {value}")


@dataclass(frozen=True)
class AugmentationSettings:
    """How far a training film may be changed. Each amount is uniform from -limit to +limit."""

    rotation_degrees: float = 12.0
    """Rotation about the centre."""
    scale: float = 0.12
    """Relative change in size."""
    shift: float = 0.05
    """Horizontal and vertical shift, as a fraction of the film's side."""
    gain: float = 0.15
    """Relative change in brightness, by a factor, so that black stays black."""
    gamma: float = 0.2
    """Natural logarithm of the gamma exponent; changes contrast as another exposure would."""
    flip_probability: float = 0.5
    """Share of films mirrored left to right: opacities have no side, even though the heart has one.
    Set it to 0 where the side matters."""
    erase_probability: float = 0.0
    """Share of films in which a rectangle is blacked out (Zhong et al. 2020, arXiv:1708.04896), so
    that no single spot decides."""
    erase_fraction: float = 0.15
    """Largest area of that rectangle, as a fraction of the film's."""

    def __post_init__(self) -> None:
        _check_finite(self)
        for name in ("rotation_degrees", "gamma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("scale", "shift", "gain"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, not {getattr(self, name)}")
        for name in ("flip_probability", "erase_probability", "erase_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class TrainingSettings:
    """All settings of a training run. A network's `recipe` overrides some of these defaults."""

    model: str = "classical-cnn"
    """A name that `lungopacity.models.build_network` knows."""
    model_settings: Mapping[str, Any] = field(default_factory=dict)
    """The network's settings that differ from its own defaults."""
    weights: str = "none"
    """First weights: none (random), imagenet, or the URI of a file."""
    positive_class: str = "Lung_Opacity"
    """The class whose probability the operating point applies to."""
    preprocessing: Preprocessing = Preprocessing()
    """How films become pixels; recorded in the model folder."""
    augmentation: AugmentationSettings = AugmentationSettings()
    """Random changes to the training films."""
    epochs: int = 30
    """Passes over the training films."""
    batch_size: int = 32
    """Films per step, over all workers together; at least two per worker, for batch
    normalisation."""
    workers: int = 1
    """Processes that train together; one CPU is reserved for each, and one GPU with use_gpu."""
    max_workers: int = 0
    """Above 0: train with as many workers as the cluster has room for, from `workers` to
    `max_workers`; their number changes as nodes join or are lost. 0: always `workers`."""
    use_gpu: bool = False
    """One GPU per worker; set by --use-gpu and --no-gpu, never by --set."""
    seed: int = 0
    """Seed of everything that training draws: first weights, order, augmentation, dropout. The
    splits have a seed of their own, the same for all models."""
    learning_rate: float = 2e-3
    """Adam's learning rate at the peak of the schedule."""
    warmup_fraction: float = 0.1
    """Share of all steps in which the learning rate rises to its peak; it then falls as a
    cosine."""
    weight_decay: float = 0.05
    """Decoupled weight decay, multiplied by the learning rate (Loshchilov & Hutter 2019)."""
    decay_kernels_only: bool = False
    """true: weight decay spares biases and the gains of normalisation layers (He et al. 2019,
    arXiv:1812.01187). false: all weights decay."""
    gradient_clip: float = 0.0
    """Largest norm of a step's gradients, over all weights together; larger ones are scaled down
    to it (Pascanu et al. 2013, arXiv:1211.5063). 0: no limit."""
    label_smoothing: float = 0.05
    """Share of the target's probability that is spread evenly over all classes (Szegedy et al.
    2016)."""
    class_balance: str = "none"
    """How classes of unequal size are balanced. none: not; weights: a film's loss is weighted by
    the inverse of its class's share; sampling: an epoch draws equally many films of each class,
    those of rare classes more than once."""
    mixup_alpha: float = 0.0
    """Films and their labels are blended in pairs, in proportions from a Beta(alpha, alpha)
    distribution (Zhang et al. 2018, arXiv:1710.09412); 0: never."""
    ema_decay: float = 0.0
    """Keep the exponential moving average of the weights, with this decay per step (Polyak &
    Juditsky 1992); 0: keep the weights themselves."""
    frozen_epochs: int = 0
    """Number of first epochs in which only the last layer learns (in the classical CNN, its hidden
    layer too), so that its random weights do not spoil the pretrained ones."""
    precision: str = "auto"
    """Of the forward and backward pass: float32, bfloat16, or auto: bfloat16 where it is fast."""
    patience: int = 0
    """Stop after this many epochs without a lower validation loss; 0: never."""

    def __post_init__(self) -> None:
        _check_finite(self)
        _check_finite(self.preprocessing)
        for name in ("epochs", "batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        for name in (
            "weight_decay", "gradient_clip", "patience", "mixup_alpha", "frozen_epochs",
            "max_workers",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, not {self.seed}")
        for name in ("warmup_fraction", "label_smoothing", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, not {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")
        if self.max_workers and self.workers > self.max_workers:
            raise ValueError(
                f"workers {self.workers}:{self.max_workers} must be MIN:MAX with 1 <= MIN <= MAX"
            )
        most = self.max_workers or self.workers
        if self.batch_size < 2 * most:
            raise ValueError(
                f"batch_size {self.batch_size} must be at least two films for each of "
                f"{'up to ' if self.max_workers else ''}{counted(most, 'worker')}"
            )
        if not self.max_workers and self.batch_size % self.workers:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of workers ({self.workers})"
            )
        for name, known in (("precision", TRAINING_PRECISIONS), ("class_balance", BALANCES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}"
                )

    def as_json(self) -> dict[str, Any]:
        """Every setting, as values that JSON can hold."""
        return {**asdict(self), "model_settings": dict(self.model_settings)}


_CLASSICAL: dict[str, Any] = {"epochs": 40, "ema_decay": 0.995}
_TRANSFER: dict[str, Any] = {
    "weights": "imagenet",
    "model_settings": {"dropout": 0.3, "drop_path": 0.1},
    "epochs": 8,
    "learning_rate": 1e-3,
    "ema_decay": 0.99,
}
"""For networks whose ImageNet weights are installed."""
_FRESH: dict[str, Any] = {"learning_rate": 1e-3, "ema_decay": 0.99}
"""For all other networks, which start from random weights."""


def recipe(model: str) -> TrainingSettings:
    """The settings a network is trained with unless the user changes them; docs/models.md has the
    runs that they were chosen by. Raises `UserError` for an unknown name."""
    card = network_card(model)
    if model == "classical-cnn":
        chosen = _CLASSICAL
    else:
        chosen = _TRANSFER if card.weights == "installed" else _FRESH
    return TrainingSettings(model=model, preprocessing=card.preprocessing, **chosen)


def with_words(
    settings: TrainingSettings,
    words: Mapping[str, str],
    options: Mapping[str, Any] | None = None,
) -> TrainingSettings:
    """The settings with some of them changed.

    words: values as text, by name, such as `1e-3` for `learning_rate`. Names inside a part are
    `augmentation.NAME`, `preprocessing.NAME` and `model_settings.NAME`; a word for the last is
    JSON. options: values by name, or a mapping for a part; words take precedence. All are changed
    at once, so their order does not matter. Raises `ValueError` for an unknown name, for a word of
    the wrong type, and for values that no run can use.
    """
    changes = {
        name: dict(value) if isinstance(value, Mapping) else value
        for name, value in (options or {}).items()
    }
    for path, word in words.items():
        _gather(changes, settings, path, word)
    return _changed(settings, changes)  # type: ignore[no-any-return]


def _gather(changes: dict[str, Any], settings: Any, path: str, word: str, inside: str = "") -> None:
    """Adds the value that the word stands for to the changes.

    inside: of which part the settings are, such as `augmentation.`, for the messages.
    """
    name, _, rest = path.partition(".")
    own = {item.name for item in fields(settings)}
    if name not in own or name == "model":
        known = ", ".join(sorted(own - {"model"}))
        raise ValueError(f"set: there is no setting '{inside}{name}'; the settings are {known}")
    old = getattr(settings, name)
    if isinstance(old, Mapping):
        if not rest:
            raise ValueError(f"set: {name} needs the name of one of them, such as {name}.dropout")
        changes.setdefault(name, {})[rest] = _json(inside + path, word)
        return
    if rest:
        if not hasattr(old, "__dataclass_fields__"):
            raise ValueError(f"set: {inside}{name} has no parts")
        _gather(changes.setdefault(name, {}), old, rest, word, f"{name}.")
        return
    if hasattr(old, "__dataclass_fields__"):
        part = fields(old)[0].name
        raise ValueError(f"set: {name} needs the name of one of its parts, such as {name}.{part}")
    changes[name] = word if isinstance(old, str) else _typed(inside + path, word, type(old))


def _changed(settings: Any, changes: Mapping[str, Any], inside: str = "") -> Any:
    new: dict[str, Any] = {}
    for name, value in changes.items():
        old = getattr(settings, name)
        if isinstance(old, Mapping):
            new[name] = {**old, **value}
        else:
            part = isinstance(value, Mapping)
            new[name] = _changed(old, value, f"{name}.") if part else value
    try:
        return replace(settings, **new)
    except ValueError as error:
        raise ValueError(f"{inside}{error}") from None


def _typed(path: str, word: str, kind: type) -> Any:
    """The value that the word stands for; kind: int, float or bool."""
    with contextlib.suppress(ValueError, OverflowError):
        value = json.loads(word)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is kind:
            return value
    raise ValueError(f"set: {path} must be {_KINDS[kind]}, not '{word}'")


def _json(path: str, word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        raise ValueError(
            f"set: {path} must be JSON, such as 3, 0.5, true, [8, 16] or \"word\", not '{word}'"
        ) from None
