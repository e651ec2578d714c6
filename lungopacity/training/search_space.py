"""The settings that `tune` searches, and the domains that it draws them from.

A drawn value is a word for `train --set NAME=WORD`, so that what was tried can be trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from lungopacity.models import network_card, settings_of_network
from lungopacity.training.settings import TrainingSettings, with_words

_FORMS = "log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH or choice:A,B,…"
_FIXED = {
    "preprocessing", "model_settings.image_size", "positive_class", "weights", "workers",
    "max_workers", "use_gpu", "seed",
}  # fmt: skip
"""Settings that all trials share: they determine the films, the class that is scored, the first
weights, the seed, or what a trial runs on."""

_EVERY = {
    "weight_decay": "log:0.005:0.2",
    "label_smoothing": "choice:0,0.05,0.1",
    "mixup_alpha": "choice:0,0.1,0.2,0.4",
    "ema_decay": "choice:0,0.95,0.99,0.995",
    "augmentation.rotation_degrees": "uniform:0:20",
    "augmentation.scale": "uniform:0:0.25",
    "augmentation.gain": "uniform:0:0.3",
    "augmentation.gamma": "uniform:0:0.4",
    "augmentation.erase_probability": "choice:0,0.25,0.5",
    "model_settings.dropout": "uniform:0:0.5",
}
"""For every network: how strongly it is kept from memorising the training films."""
_CLASSICAL = {"learning_rate": "log:5e-4:8e-3", **_EVERY}
"""For the classical CNN: from a quarter of its recipe's learning rate to four times that."""
_FRESH = {"learning_rate": "log:2e-4:5e-3", **_EVERY}
"""For the other networks that start from random weights."""
_TRANSFER = {
    "learning_rate": "log:1e-4:3e-3",
    **_EVERY,
    "model_settings.drop_path": "choice:0,0.1,0.2",
    "frozen_epochs": "choice:0,1",
}
"""For networks whose ImageNet weights are installed: lower learning rates, which keep what was
learnt, and one epoch of the last layer alone, or none."""


@dataclass(frozen=True)
class Domain:
    """The distribution that one setting is drawn from."""

    kind: str
    """log: uniform in the logarithm; uniform; int: whole numbers, including both ends; choice: one
    of `words`."""
    low: float = 0.0
    high: float = 0.0
    words: tuple[str, ...] = ()

    def draw(self, rng: np.random.Generator) -> str:
        """A word for `--set`; fractional numbers have four significant digits."""
        if self.kind == "choice":
            return self.words[int(rng.integers(len(self.words)))]
        if self.kind == "int":
            return str(int(rng.integers(int(self.low), int(self.high), endpoint=True)))
        if self.kind == "log":
            return f"{math.exp(rng.uniform(math.log(self.low), math.log(self.high))):.4g}"
        return f"{rng.uniform(self.low, self.high):.4g}"

    def ends(self) -> tuple[str, ...]:
        """The extreme words; where these are valid, all are."""
        if self.kind == "choice":
            return self.words
        if self.kind == "int":
            return str(int(self.low)), str(int(self.high))
        return f"{self.low:.4g}", f"{self.high:.4g}"

    @property
    def fractions(self) -> bool:
        """Whether it draws numbers that are not whole."""
        return self.kind in ("log", "uniform")

    @property
    def arrow_type(self) -> pa.DataType:
        """The type of the setting's column in `trials_table`."""
        if self.kind != "choice":
            return pa.int64() if self.kind == "int" else pa.float64()
        return pa.float64() if all(map(_is_number, self.words)) else pa.string()


def parse_domain(text: str) -> Domain:
    """Parses a form such as `log:1e-4:1e-2`. Raises `ValueError`."""
    kind, _, rest = text.partition(":")
    if kind == "choice":
        words = tuple(word.strip() for word in rest.split(",") if word.strip())
        if words:
            return Domain(kind, words=words)
    elif kind in ("log", "uniform", "int"):
        ends = rest.split(":")
        if len(ends) == 2 and all(map(_is_number, ends)):
            low, high = map(float, ends)
            whole = kind != "int" or (low.is_integer() and high.is_integer())
            if low < high and whole and (kind != "log" or low > 0):
                return Domain(kind, low, high)
    raise ValueError(f"'{text}' is none of {_FORMS}, with LOW below HIGH, and above 0 for log")


def default_space(model: str) -> dict[str, str]:
    """A network's default search, forms by setting. Raises `UserError` for an unknown name."""
    if model == "classical-cnn":
        return dict(_CLASSICAL)
    return dict(_TRANSFER if network_card(model).weights == "installed" else _FRESH)


def search_space(settings: TrainingSettings, search: Mapping[str, str]) -> dict[str, Domain]:
    """The domain of each searched setting. search: forms by setting; if empty, the network's
    default. Raises `ValueError` for an unknown setting or form, and for a form that draws values
    that the setting or the network refuses."""
    of_network = settings_of_network(settings.model, 2, settings.model_settings)
    space = {}
    for name, text in (search or default_space(settings.model)).items():
        part, inside, leaf = name.partition(".")
        if _FIXED & {name, part}:
            raise ValueError(f"{name}: is the same in all trials; leave it out of the search")
        try:
            space[name] = domain = parse_domain(text)
            owner = getattr(settings, part, None) if inside else settings
            if part == "model_settings":
                owner = of_network
            # An unknown name is refused below, by `with_words` or by the network.
            if domain.fractions and not isinstance(getattr(type(owner), leaf or name, 0.0), float):
                whole = f"int:{math.floor(domain.low)}:{math.ceil(domain.high)}"
                raise ValueError(f"'{text}' draws fractions; give {whole}, or choice:A,B,…")
            for word in domain.ends():
                tried = with_words(settings, {name: word})
                if owner is of_network:
                    settings_of_network(tried.model, 2, tried.model_settings)
        except ValueError as error:
            raise ValueError(f"{name}: {str(error).removeprefix('set: ')}") from None
    return space


def draw(space: Mapping[str, Domain], seed: int, trial: int) -> dict[str, str]:
    """The words of a trial. They depend neither on the number of trials nor on the order of the
    space. Trial 0 has none: it is the recipe itself, as the baseline."""
    if trial == 0:
        return {}
    rng = np.random.default_rng([seed, trial])
    return {name: domain.draw(rng) for name, domain in sorted(space.items())}


def with_draw(settings: TrainingSettings, words: Mapping[str, str]) -> TrainingSettings:
    """The settings of a trial, with one worker, because trials run in parallel."""
    return replace(with_words(settings, words), workers=1, max_workers=0)


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def value_of(word: str, kind: pa.DataType) -> float | int | str:
    """The value of a word in a column of that type."""
    return word if pa.types.is_string(kind) else json.loads(word)
