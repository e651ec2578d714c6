"""By which rules a run screens: what two attempts at one run must agree in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lungopacity.models.scorer import FLOAT32


@dataclass(frozen=True)
class Rules:
    """Part of a run's start and of its commit record."""

    positive_class: str
    """Of models that differ in it alone the id is the same."""
    accept: tuple[str, ...] = ()
    """Error codes of what is scored all the same, sorted."""
    reject_quality: tuple[str, ...] = ()
    """Quality flags that reject a film, sorted."""
    hmac_key_fingerprint: str | None = None
    hash_keys: bool = False
    """Whether names of objects are hashed, too."""
    operating_point: str | None = None
    """Its name, where it is not the model's own choice."""
    threshold: float = 0.5
    review_from: float | None = None
    explain: bool = False
    precision: str = FLOAT32

    def settings(self) -> dict[str, Any]:
        """By name, as JSON gives them back."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Rules:
        """The rules behind `settings()`. Raises `TypeError` where these are of another version."""
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in settings.items()
        }
        return Rules(**given)

    def that_differ(self, settings: Mapping[str, Any]) -> list[str]:
        """Names of the rules that the settings of another run tell otherwise, or not at all."""
        return [name for name, value in self.settings().items() if settings.get(name) != value]
