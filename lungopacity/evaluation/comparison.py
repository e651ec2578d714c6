"""The result of `compare`, as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from lungopacity.errors import NOTICE
from lungopacity.words import counted


@dataclass(frozen=True)
class AucDifference:
    """The areas under the ROC curve of the first and second model."""

    first: float
    second: float
    difference: float
    """Second minus first."""
    ci_low: float | None
    ci_high: float | None
    """The 95 % interval of the difference."""
    p_value: float | None
    """Two-sided; 1 if the two never differ. It and the interval are None if the differences have no
    spread, or if there are fewer than two films of a kind."""


@dataclass(frozen=True)
class ShareDifference:
    """The shares of films that the first and second model get right."""

    first: float
    second: float
    difference: float
    """Second minus first."""
    ci_low: float
    ci_high: float
    """The 95 % interval of the difference, over patients."""
    only_first_right: int
    only_second_right: int
    p_value: float
    """Two-sided. The exact test is stricter than the interval: with few films that only one is
    right on, it may exceed 0.05 though the interval leaves out 0."""


@dataclass(frozen=True)
class ClusteredDifference:
    """The difference in AUC, second minus first, over patients."""

    patients: int
    auc_ci_low: float | None
    auc_ci_high: float | None
    """The 95 % interval; None if the replicates give none, as for models that never differ."""
    intervals: str
    """How it was computed."""


@dataclass(frozen=True)
class Comparison:
    """Two models on the images that both reports have."""

    first_model: str
    second_model: str
    images: int
    first_images: int
    second_images: int
    """Images of each report. Those that only one report has are not compared."""
    positive_class: str
    first_decided_at: str | None
    second_decided_at: str | None
    """The names of the operating points; None if a report is too old to record it."""
    first_picked_on: int
    second_picked_on: int
    """For each report, the number of its films that its operating point was picked on. On these its
    decisions look too good."""
    first_known: int
    second_known: int
    """For each report, the number of its films that its model was trained, selected or calibrated
    on. On these it looks too good; the reports do not tell whether both have them."""
    synthetic: bool
    auc: AucDifference
    accuracy: ShareDifference
    """Of the most probable class."""
    sensitivity: ShareDifference | None
    """The share of positive films that are decided positive, each at its report's operating point.
    None if the reports have different positive classes, or if one is too old to have decisions."""
    specificity: ShareDifference | None
    """The share of the other films that are not decided positive."""
    clustered: ClusteredDifference | None
    """None if no patient has more than one film, or if the reports are too old to say."""

    def summary(self) -> str:
        """A few lines for a terminal."""
        auc = self.auc
        return "\n".join(
            [
                f"first {self.first_model}, second {self.second_model}: {self.images} images"
                + self._of_how_many()
                + (" (synthetic)" if self.synthetic else ""),
                f"  AUC of {self.positive_class}  {auc.first:.4f} and {auc.second:.4f}, difference "
                f"{auc.difference:+.4f}{_interval(auc.ci_low, auc.ci_high)}, DeLong p "
                + ("is undefined" if auc.p_value is None else f"= {auc.p_value:.3g}"),
                *(_share_line(name, share) for name, share in self._shares().items()),
                *self._known(),
                *self._points(),
                *self._clustered(),
                NOTICE,
            ]
        )

    def _of_how_many(self) -> str:
        """Empty unless a report has films that the other does not."""
        each = (self.first_images, self.second_images)
        same = each == (self.images, self.images)
        return "" if same else " that both have, of {} and {}".format(*each)

    def _known(self) -> list[str]:
        """A line for each model that knows some of its report's films."""
        return [
            f"  the {which} was trained, selected or calibrated on {films} films of its report: "
            "where these are compared, it looks too good"
            for which, films in (("first", self.first_known), ("second", self.second_known))
            if films
        ]

    def _points(self) -> list[str]:
        """Lines about the operating points, if decisions are compared and the points are known."""
        first, second = self.first_decided_at, self.second_decided_at
        if self.sensitivity is None or first is None or second is None:
            return []
        lines = [
            f"  sensitivity, specificity: the first decided at {first}, the second at {second}"
        ]
        for which, films in (("first", self.first_picked_on), ("second", self.second_picked_on)):
            if films:
                lines.append(
                    f"  the {which}'s was picked on {films} films of its report: its decisions "
                    "look too good"
                )
        return lines

    def _shares(self) -> dict[str, ShareDifference]:
        """The shares that both reports have, by name."""
        of_decisions = {"sensitivity": self.sensitivity, "specificity": self.specificity}
        known = {name: share for name, share in of_decisions.items() if share is not None}
        return {"accuracy": self.accuracy, **known}

    def _clustered(self) -> list[str]:
        found = self.clustered
        if found is None:
            return []
        return [
            f"  some of the {found.patients} patients have several films, which DeLong and McNemar "
            f"treat as independent; the intervals of {', '.join(self._shares())} do not",
            f"  over patients: AUC difference {self.auc.difference:+.4f}"
            f"{_interval(found.auc_ci_low, found.auc_ci_high)}",
            f"  ({found.intervals})",
        ]

    def to_json(self) -> str:
        """All fields."""
        return json.dumps({"notice": NOTICE, **asdict(self)}, indent=2)


def _share_line(name: str, share: ShareDifference) -> str:
    return (
        f"  {name}  {share.first:.4f} and {share.second:.4f}, difference {share.difference:+.4f}"
        f"{_interval(share.ci_low, share.ci_high)}; only the first is right on "
        f"{counted(share.only_first_right, 'film')}, only the second on "
        f"{share.only_second_right}, McNemar p = {share.p_value:.3g}"
    )


def _interval(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return " (no interval)"
    return f" (95 % interval {low:+.4f} to {high:+.4f})"
