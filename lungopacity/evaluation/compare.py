"""Two models on the same films: which is better, and whether the difference could be chance.

* AUC: DeLong, DeLong & Clarke-Pearson 1988, Biometrics 44:837, for two correlated curves.
* Accuracy, sensitivity and specificity: the exact test of McNemar 1947, Psychometrika 12:153, on
  the films that one of the two gets right and the other wrong.

Both take every film for a patient of its own. Where patients have several, the differences also
have intervals of the bootstrap over patients (`bootstrap`), in which both models see the same ones.
"""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import binomtest

from lungopacity.errors import NOTICE, ErrorCode, ImageError, UserError
from lungopacity.evaluation.bootstrap import (
    Resampling,
    percentile_interval,
    ratio,
    weighted_auc,
)
from lungopacity.evaluation.metrics import Floats, roc_auc, roc_components
from lungopacity.results.schema import class_column
from lungopacity.storage import open_store
from lungopacity.words import counted

log = logging.getLogger(__name__)

_Z_95 = NormalDist().inv_cdf(0.975)
_ROUNDING = 1e-12
"""Of a share in float64. Two shares of n films that differ do so by 1 / 2n or more."""
_COLUMNS = {"image", "label", "predicted_label", "model_id", "synthetic"}
"""Of a report's predictions, besides a score a class."""
Share = tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]
"""(N, 2) which films each model gets right, and (N,) the films of which that is a share."""


@dataclass(frozen=True)
class AucDifference:
    """Of the first and second model's areas under the ROC curve."""

    first: float
    second: float
    difference: float
    """Second minus first."""
    ci_low: float | None
    ci_high: float | None
    """Its 95 % interval."""
    p_value: float | None
    """Two-sided; 1 where the two never differ. Of differences without any spread neither can be
    told, nor of fewer than two films of a kind: None."""


@dataclass(frozen=True)
class ShareDifference:
    """Of the first and second model's shares of films that each gets right."""

    first: float
    second: float
    only_first_right: int
    only_second_right: int
    p_value: float

    @property
    def difference(self) -> float:
        """Second minus first."""
        return self.second - self.first


@dataclass(frozen=True)
class ClusteredDifference:
    """95 % intervals of the differences, second minus first, over patients."""

    patients: int
    auc_ci_low: float | None
    auc_ci_high: float | None
    accuracy_ci_low: float | None
    accuracy_ci_high: float | None
    sensitivity_ci_low: float | None
    sensitivity_ci_high: float | None
    specificity_ci_low: float | None
    specificity_ci_high: float | None
    """None where the replicates show none, as of models that never differ."""
    intervals: str
    """How they were made."""


@dataclass(frozen=True)
class Comparison:
    """Two models on the images that both reports hold."""

    first_model: str
    second_model: str
    images: int
    first_images: int
    second_images: int
    """Of each report: films that one alone holds are in no figure here."""
    positive_class: str
    first_decided_at: str | None
    second_decided_at: str | None
    """The names of the operating points. None where a report is too old to tell."""
    first_picked_on: int
    second_picked_on: int
    """Of each report, on how many of its films its point was picked: they flatter its decisions."""
    synthetic: bool
    auc: AucDifference
    accuracy: ShareDifference
    """Of the most probable class."""
    sensitivity: ShareDifference | None
    """Of the films of the positive class, those decided positive: each at its report's operating
    point. None where the reports decide about different classes, or one is too old to tell."""
    specificity: ShareDifference | None
    """Of the other films, those not decided positive."""
    clustered: ClusteredDifference | None
    """None where no patient has more than one film, or the reports are too old to tell."""

    def summary(self) -> str:
        """A few lines for a terminal."""
        auc = self.auc
        return "\n".join(
            [
                f"first {self.first_model}, second {self.second_model}: {self.images} images"
                + self._of_how_many()
                + (" (synthetic)" if self.synthetic else ""),
                f"  AUC of {self.positive_class}  {auc.first:.4f} and {auc.second:.4f}, difference "
                f"{auc.difference:+.4f}{_told(auc.ci_low, auc.ci_high)}, DeLong p "
                + ("cannot be told" if auc.p_value is None else f"= {auc.p_value:.3g}"),
                *(_told_share(name, share) for name, share in self._shares().items()),
                *self._points(),
                *self._clustered(),
                NOTICE,
            ]
        )

    def _of_how_many(self) -> str:
        """Where a report holds films that the other does not."""
        each = (self.first_images, self.second_images)
        return (
            ""
            if each == (self.images, self.images)
            else " that both hold, of {} and {}".format(*each)
        )

    def _points(self) -> list[str]:
        """Where decisions are compared, and the reports tell where they were made."""
        first, second = self.first_decided_at, self.second_decided_at
        if self.sensitivity is None or first is None or second is None:
            return []
        told = [f"  sensitivity, specificity: the first decided at {first}, the second at {second}"]
        for which, films in (("first", self.first_picked_on), ("second", self.second_picked_on)):
            if films:
                told.append(
                    f"  the {which}'s was picked on {films} films of its report: its decisions "
                    "flatter"
                )
        return told

    def _shares(self) -> dict[str, ShareDifference]:
        """Those that both reports tell, by name."""
        of_decisions = {"sensitivity": self.sensitivity, "specificity": self.specificity}
        known = {name: share for name, share in of_decisions.items() if share is not None}
        return {"accuracy": self.accuracy, **known}

    def _clustered(self) -> list[str]:
        found = self.clustered
        if found is None:
            return []
        differences = {"AUC": self.auc.difference}
        differences |= {name: share.difference for name, share in self._shares().items()}
        bounds = vars(found)
        return [
            f"  some of the {found.patients} patients have several films, which DeLong and McNemar "
            "take for independent",
            *(
                f"  over patients: {name} difference {difference:+.4f}"
                + _told(bounds[f"{name.lower()}_ci_low"], bounds[f"{name.lower()}_ci_high"])
                for name, difference in differences.items()
            ),
            f"  ({found.intervals})",
        ]

    def to_json(self) -> str:
        """Everything."""
        return json.dumps({"notice": NOTICE, **asdict(self)}, indent=2)


def compare(first: str, second: str) -> Comparison:
    """Compare two reports of `evaluate`, by the images that they share.

    Raises `UserError` where a report cannot be read, the labels differ, the classes or the bytes of
    an image, where they share no image, or where a class does not occur.
    """
    one, other = _read(first), _read(second)
    classes = [{name for name in frame.columns if name.startswith("p_")} for frame in (one, other)]
    if classes[0] != classes[1]:
        raise UserError(f"{first} and {second} are of models with different classes")
    both = one.merge(other, on="image", suffixes=("", "_second"))
    if both.empty:
        raise UserError(f"{first} and {second} share no image; evaluate both on the same split")
    if "content_sha256_second" in both:
        # Not so where a report is too old to tell.
        others = both.loc[both["content_sha256"] != both["content_sha256_second"], "image"]
        if len(others):
            raise UserError(
                f"{first} and {second}: {len(others)} of {len(both)} images of one name are not of "
                f"the same bytes, as {others.iloc[0]}; evaluate both on the same films"
            )
    if (both["label"] != both["label_second"]).any():
        raise UserError(f"{first} and {second} label some images differently; use the same labels")
    positive, decided_at, picked_on = _facts(first)
    other_positive, other_decided_at, other_picked_on = _facts(second)
    if other_positive != positive:
        log.warning(
            "%s decides about %s and %s about %s: their decisions are not compared",
            first,
            positive,
            second,
            other_positive,
        )
        both = both.drop(columns=["decision", "decision_second"], errors="ignore")
    positive_N = (both["label"] == positive).to_numpy()
    if positive_N.all() or not positive_N.any():
        raise UserError(f"the shared images are all, or none of them, {positive}")
    column = class_column("p", positive)
    scores_N2 = both[[column, f"{column}_second"]].to_numpy(np.float64)
    shares = _shares_of(both, positive_N)
    differences = {
        name: share_difference(right_N2[of_N]) for name, (right_N2, of_N) in shares.items()
    }
    return Comparison(
        first_model=str(one["model_id"].iloc[0]),
        second_model=str(other["model_id"].iloc[0]),
        images=len(both),
        first_images=len(one),
        second_images=len(other),
        positive_class=positive,
        first_decided_at=decided_at,
        second_decided_at=other_decided_at,
        first_picked_on=picked_on,
        second_picked_on=other_picked_on,
        synthetic=bool(both["synthetic"].any() or both["synthetic_second"].any()),
        auc=auc_difference(positive_N, scores_N2[:, 0], scores_N2[:, 1]),
        accuracy=differences["accuracy"],
        sensitivity=differences.get("sensitivity"),
        specificity=differences.get("specificity"),
        clustered=clustered_difference(positive_N, scores_N2, shares, _patients(both)),
    )


def _shares_of(both: pd.DataFrame, positive_N: npt.NDArray[np.bool_]) -> dict[str, Share]:
    """Accuracy, and of reports that tell their decisions sensitivity and specificity."""
    predicted_N2 = both[["predicted_label", "predicted_label_second"]].to_numpy()
    right_N2 = predicted_N2 == both["label"].to_numpy()[:, None]
    shares = {"accuracy": (right_N2, np.ones_like(positive_N))}
    if {"decision", "decision_second"} <= set(both):
        # What is under review is not positive, as in `decision_shares`.
        called_N2 = both[["decision", "decision_second"]].to_numpy() == "positive"
        shares["sensitivity"] = called_N2, positive_N
        shares["specificity"] = ~called_N2, ~positive_N
    return shares


def auc_difference(
    positive_N: npt.NDArray[np.bool_], first_N: Floats, second_N: Floats
) -> AucDifference:
    """DeLong's test of two models' scores of the same images, higher for positives."""
    first, second = (roc_auc(positive_N, scores).value for scores in (first_N, second_N))
    of_positives, of_negatives = (
        np.subtract(*parts)
        for parts in zip(
            roc_components(positive_N, second_N), roc_components(positive_N, first_N), strict=True
        )
    )
    difference = second - first
    if len(of_positives) < 2 or len(of_negatives) < 2:
        return AucDifference(first, second, difference, None, None, None)
    if max(np.ptp(of_positives), np.ptp(of_negatives)) < _ROUNDING:
        # Two models that rank all alike; or a difference that is the same with every film left
        # out, of which the spread that the test rests on cannot be told.
        same = abs(difference) < _ROUNDING
        return AucDifference(first, second, difference, None, None, 1.0 if same else None)
    # The variance of a difference of paired components is that of the differences.
    error = math.sqrt(
        of_positives.var(ddof=1) / len(of_positives) + of_negatives.var(ddof=1) / len(of_negatives)
    )
    p_value = 2 * NormalDist().cdf(-abs(difference) / error)
    half = _Z_95 * error
    return AucDifference(first, second, difference, difference - half, difference + half, p_value)


def share_difference(right_N2: npt.NDArray[np.bool_]) -> ShareDifference:
    """McNemar's exact test; a column a model: whether it is right."""
    only_first = int((right_N2[:, 0] & ~right_N2[:, 1]).sum())
    only_second = int((right_N2[:, 1] & ~right_N2[:, 0]).sum())
    differ = only_first + only_second
    p_value = float(binomtest(only_first, differ).pvalue) if differ else 1.0
    first, second = right_N2.mean(axis=0)
    return ShareDifference(float(first), float(second), only_first, only_second, p_value)


def clustered_difference(
    positive_N: npt.NDArray[np.bool_],
    scores_N2: Floats,
    shares: Mapping[str, Share],
    resampling: Resampling,
) -> ClusteredDifference | None:
    """The differences of the AUC and of each share with patients drawn anew; a column a model. None
    without clusters."""
    if not resampling.clustered:
        return None
    drawn: dict[str, list[npt.NDArray[np.float64]]] = {}
    for weights_RN in resampling.weights():
        first_R, second_R = (
            weighted_auc(positive_N, scores_N, weights_RN) for scores_N in scores_N2.T
        )
        drawn.setdefault("auc", []).append(second_R - first_R)
        for name, (right_N2, of_N) in shares.items():
            gained_N = of_N * (right_N2[:, 1].astype(np.float64) - right_N2[:, 0])
            gained_R = ratio(weights_RN @ gained_N, weights_RN @ of_N.astype(np.float64))
            drawn.setdefault(name, []).append(gained_R)
    bounds: dict[str, float | None] = {}
    for name in ("auc", "accuracy", "sensitivity", "specificity"):
        low, high = percentile_interval(np.concatenate(drawn.get(name, [np.empty(0)])))
        bounds[f"{name}_ci_low"], bounds[f"{name}_ci_high"] = low, high
    return ClusteredDifference(
        patients=resampling.patients, intervals=resampling.described(), **bounds
    )


def _patients(both: pd.DataFrame) -> Resampling:
    """As the report that knows more films to be of one patient numbers them: the other's labels may
    name none, and the number of one means nothing in the other."""
    told = [
        Resampling.of([None if pd.isna(n) else str(n) for n in both[column]])
        for column in ("patient_cluster", "patient_cluster_second")
        if column in both
    ]
    return min(told, key=lambda one: one.patients, default=Resampling.of([None] * len(both)))


def _told_share(name: str, share: ShareDifference) -> str:
    return (
        f"  {name}  {share.first:.4f} and {share.second:.4f}; right alone: the first "
        f"on {counted(share.only_first_right, 'film')}, the second on {share.only_second_right}, "
        f"McNemar p = {share.p_value:.3g}"
    )


def _told(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return " (no interval)"
    return f" (95 % interval {low:+.4f} to {high:+.4f})"


def _read(report: str) -> pd.DataFrame:
    try:
        data = open_store(report).read("predictions.parquet")
        frame = pd.read_parquet(io.BytesIO(data))
        if _COLUMNS - set(frame.columns):
            raise ValueError("of another kind")
    except (ImageError, OSError, ValueError) as error:
        if isinstance(error, ImageError) and error.code is not ErrorCode.MISSING:
            raise UserError(
                f"{report}: the report cannot be read ({error.message}); try again"
            ) from error
        raise UserError(
            f"{report}: no report lies there; give the --output of `lungopacity evaluate`"
        ) from error
    return frame.drop_duplicates("image")


def _facts(report: str) -> tuple[str, str | None, int]:
    """The class that it decides about, the operating point's name, where it tells, and on how many
    of its films that was picked."""
    try:
        facts = json.loads(open_store(report).read("evaluation.json"))
        positive, decided_at = str(facts["positive_class"]), facts.get("decided_at")
        return positive, decided_at, facts.get("picked_on", {}).get(decided_at, 0)
    except (ImageError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{report}/evaluation.json cannot be read; evaluate again") from error
