"""The rules by which a run screens: two attempts at one run must have the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lungopacity.models.scorer import FLOAT32


@dataclass(frozen=True)
class Rules:
    """Settings that change what a run publishes. Part of a run's start and of its commit record."""

    positive_class: str
    """A rule, because models that differ only in their positive class have the same id."""
    accept: tuple[str, ...] = ()
    """Error codes that do not keep a film from being scored, sorted."""
    reject_quality: tuple[str, ...] = ()
    """Quality flags that reject a film, sorted."""
    hmac_key_fingerprint: str | None = None
    hash_keys: bool = False
    """Whether names of objects are hashed, too."""
    operating_point: str | None = None
    """The name of the operating point; None is the model's own choice."""
    threshold: float = 0.5
    review_from: float | None = None
    by_view: Mapping[str, Mapping[str, float | None]] | None = None
    """`threshold` and `review_from` of films of some views, see `OperatingPoint`; None: of none."""
    explain: bool = False
    precision: str = FLOAT32

    def settings(self) -> dict[str, Any]:
        """The rules by name, with lists for tuples, as they come back from JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Rules:
        """The inverse of `settings`. Raises `TypeError` if another version wrote them."""
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in settings.items()
        }
        return Rules(**given)

    def that_differ(self, settings: Mapping[str, Any]) -> list[str]:
        """Names of the rules that are different, or missing, in the settings of another run."""
        return [name for name, value in self.settings().items() if settings.get(name) != value]
