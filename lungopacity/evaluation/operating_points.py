"""Operating points: rules that pick the threshold for decisions from labelled scores.

Array names carry their shape: N images, S thresholds in ascending order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lungopacity.errors import UserError
from lungopacity.models import OperatingPoint

RULES = {
    "youden": "the highest sensitivity + specificity - 1 (Youden 1950)",
    "sensitivity=0.95": "at least this sensitivity, and then the highest specificity",
    "specificity=0.95": "at least this specificity, and then the highest sensitivity",
    "cost=5": "the least cost, if a missed opacity costs as much as five false alarms",
    "cost=5@0.02": "the same, if 2 % of the films have an opacity instead of the share here",
    "band=0.99,0.95": "positive from a specificity of 0.95, review from a sensitivity of 0.99",
}
"""The rules of `pick`: an example of each, and what it does."""

STANDARD = ("youden", "sensitivity=0.95", "specificity=0.95", "cost=5", "band=0.99,0.95")
"""The rules whose operating points every model folder has."""

FEWEST_IMAGES = 30
"""Fewest images of either kind: with fewer, a threshold is mostly chance."""
_HIGHEST_COST = 1e6
"""Highest cost of a missed opacity, in false alarms. With more, rounding would lose the cost of the
false alarms."""


@dataclass(frozen=True)
class _Curve:
    """Each possible threshold, with its sensitivity and specificity."""

    threshold_S: npt.NDArray[np.float64]
    sensitivity_S: npt.NDArray[np.float64]
    specificity_S: npt.NDArray[np.float64]

    @staticmethod
    def of(scores_N: npt.NDArray[np.floating], positive_N: npt.NDArray[np.bool_]) -> _Curve:
        scores_S, which_N = np.unique(scores_N.astype(np.float64), return_inverse=True)
        positives = np.bincount(which_N, positive_N, len(scores_S))
        negatives = np.bincount(which_N, ~positive_N, len(scores_S))
        # Halfway to the next lower score, so that no score equals a threshold and rounding does not
        # matter.
        threshold_S = (np.concatenate([[0.0], scores_S[:-1]]) + scores_S) / 2
        # Entry i is positive from score i upwards. Each share is one division of whole numbers, so
        # that equal shares are equal: 1 - 9 / 10 would be a little less than 0.1.
        sensitivity_S = positives[::-1].cumsum()[::-1] / positives.sum()
        specificity_S = (negatives.cumsum() - negatives) / negatives.sum()
        if scores_S[-1] < 1:
            threshold_S = np.append(threshold_S, (scores_S[-1] + 1) / 2)
            sensitivity_S, specificity_S = np.append(sensitivity_S, 0), np.append(specificity_S, 1)
        return _Curve(threshold_S, sensitivity_S, specificity_S)

    def at_sensitivity(self, least: float) -> int:
        """Index of the threshold with the highest specificity among those that reach this
        sensitivity (the lowest threshold reaches 1); of several, the most sensitive."""
        reached = np.flatnonzero(self.sensitivity_S >= least)
        highest = self.specificity_S[reached[-1]]
        return int(np.flatnonzero(self.specificity_S >= highest)[0])

    def at_specificity(self, least: float) -> int:
        """Index of the threshold with the highest sensitivity among those that reach this
        specificity; of several, the most specific. If negatives of score 1 keep all from reaching
        it, the highest specificity stands for it."""
        reached = np.flatnonzero(self.specificity_S >= min(least, self.specificity_S[-1]))
        highest = self.sensitivity_S[reached[0]]
        return int(np.flatnonzero(self.sensitivity_S >= highest)[-1])


def pick(
    rule: str,
    probabilities_N: npt.NDArray[np.floating],
    positive_N: npt.NDArray[np.bool_],
    where: str = "validation",
) -> OperatingPoint:
    """Pick a threshold by one of `RULES`.

    probabilities_N: calibrated, of the positive class. positive_N: whether it is the true class. Of
    thresholds that do equally well, the most sensitive is taken; with specificity=…, the most
    specific. `where`: the images in words, for `chosen_by`. Raises `UserError` for an unknown rule,
    and without positive or without negative images.
    """
    name, numbers = _parsed(rule)
    if not positive_N.any() or positive_N.all():
        raise UserError(
            f"a threshold needs images with and without the positive class; {where} has "
            f"{int(positive_N.sum())} and {int((~positive_N).sum())}"
        )
    curve = _Curve.of(probabilities_N, positive_N)
    review: int | None = None
    if name == "youden":
        found = int(np.argmax(np.round(curve.sensitivity_S + curve.specificity_S, 9)))
    elif name == "sensitivity":
        found = curve.at_sensitivity(numbers[0])
    elif name == "specificity":
        found = curve.at_specificity(numbers[0])
    elif name == "cost":
        prevalence = numbers[1] if len(numbers) > 1 else float(positive_N.mean())
        missed_S = numbers[0] * prevalence * (1 - curve.sensitivity_S)
        cost_S = missed_S + (1 - prevalence) * (1 - curve.specificity_S)
        found = int(np.argmin(np.round(cost_S, 9)))
    else:
        review, found = curve.at_sensitivity(numbers[0]), curve.at_specificity(numbers[1])
        # If one threshold reaches both, no band is needed.
        review = None if review >= found else review
    return OperatingPoint(
        threshold=float(curve.threshold_S[found]),
        review_from=None if review is None else float(curve.threshold_S[review]),
        chosen_by=f"{rule} on {where}",
        sensitivity=float(curve.sensitivity_S[found]),
        specificity=float(curve.specificity_S[found]),
        images=len(positive_N),
    )


def check_rule(rule: str) -> None:
    """Raises `UserError` for an unknown rule."""
    _parsed(rule)


def _parsed(rule: str) -> tuple[str, list[float]]:
    name, _, rest = rule.partition("=")
    numbers: list[float] = []
    try:
        words: Sequence[str] = rest.replace("@", ",").split(",") if rest else []
        numbers = [float(word) for word in words]
        fits = {
            "youden": not numbers,
            "sensitivity": len(numbers) == 1 and 0 < numbers[0] <= 1,
            "specificity": len(numbers) == 1 and 0 < numbers[0] <= 1,
            "cost": 1 <= len(numbers) <= 2
            and 0 < numbers[0] <= _HIGHEST_COST
            and ("@" in rest) == (len(numbers) == 2)
            and all(0 < share < 1 for share in numbers[1:]),
            "band": len(numbers) == 2
            and "@" not in rest
            and all(0 < share <= 1 for share in numbers),
        }[name]
    except (KeyError, ValueError):
        fits = False
    if not fits:
        raise UserError(f"'{rule}' is not a rule; give one such as {' or '.join(RULES)}")
    return name, numbers


def deciding_point(points: Mapping[str, OperatingPoint], decides: OperatingPoint) -> str:
    """The name of the operating point `decides` in `points`; `default` if it has none."""
    return next((name for name in points if points[name] == decides), "default")


def thresholds(point: OperatingPoint) -> str:
    """In words: `positive from 0.5462, review from 0.1000; PA views: positive from 0.0610`."""
    review = "" if point.review_from is None else f", review from {point.review_from:.4f}"
    views = [f"; {view} views: {thresholds(of)}" for view, of in point.by_view.items()]
    return f"positive from {point.threshold:.4f}{review}{''.join(views)}"


def decision_shares(
    probabilities_N: npt.NDArray[np.floating],
    positive_N: npt.NDArray[np.bool_],
    point: OperatingPoint,
    views: Sequence[str | None] | None = None,
) -> dict[str, tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]:
    """The metrics of an operating point: for each name, the images that count, and the images they
    are counted among.

    views: the view of each image, as `OperatingPoint.decide` takes it; None where none is known. An
    image under review is neither positive nor negative: decision_sensitivity and
    decision_specificity count it as not positive, decision_sensitivity_with_review as found.
    """
    at = [point.of_view(view) for view in (views if point.by_view and views else [None])]
    decided_N = probabilities_N >= np.array([one.threshold for one in at])
    lowest = [one.threshold if one.review_from is None else one.review_from for one in at]
    from_N = probabilities_N >= np.array(lowest)
    shares = {
        "decision_sensitivity": (decided_N & positive_N, positive_N),
        "decision_specificity": (~decided_N & ~positive_N, ~positive_N),
        "positive_predictive_value": (decided_N & positive_N, decided_N),
        "negative_predictive_value": (~from_N & ~positive_N, ~from_N),
    }
    if any(one.review_from is not None for one in at):
        shares["decision_sensitivity_with_review"] = (from_N & positive_N, positive_N)
        shares["review_rate"] = (from_N & ~decided_N, np.ones_like(from_N))
    return shares
