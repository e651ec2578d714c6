"""Two models on the same films: which is better, and whether the difference could be chance.

* AUC: DeLong, DeLong & Clarke-Pearson 1988, Biometrics 44:837, for two correlated curves.
* Accuracy: the exact test of McNemar 1947, Psychometrika 12:153, on the films that one of the two
  gets right and the other wrong.

Both take every film for a patient of its own. Where patients have several, the differences also
have intervals of the bootstrap over patients (`bootstrap`), in which both models see the same ones.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import binomtest

from lungopacity.errors import NOTICE, ErrorCode, ImageError, UserError
from lungopacity.evaluation.bootstrap import Resampling, percentile_interval, weighted_auc
from lungopacity.evaluation.metrics import Floats, roc_auc, roc_components
from lungopacity.results.schema import class_column
from lungopacity.storage import open_store

_Z_95 = NormalDist().inv_cdf(0.975)
_COLUMNS = {"image", "label", "predicted_label", "model_id", "synthetic"}
"""Of a report's predictions, besides a score a class."""


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
class AccuracyDifference:
    """Of the first and second model's shares of right predictions."""

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
    """None where the replicates show none, as of models that never differ."""
    intervals: str
    """How they were made."""


@dataclass(frozen=True)
class Comparison:
    """Two models on the images that both reports hold."""

    first_model: str
    second_model: str
    images: int
    positive_class: str
    synthetic: bool
    auc: AucDifference
    accuracy: AccuracyDifference
    clustered: ClusteredDifference | None
    """None where no patient has more than one film, or the reports are too old to tell."""

    def summary(self) -> str:
        """A few lines for a terminal."""
        auc, accuracy = self.auc, self.accuracy
        return "\n".join(
            [
                f"first {self.first_model}, second {self.second_model}: {self.images} images"
                + (" (synthetic)" if self.synthetic else ""),
                f"  AUC of {self.positive_class}  {auc.first:.4f} and {auc.second:.4f}, difference "
                f"{auc.difference:+.4f}{_told(auc.ci_low, auc.ci_high)}, DeLong p "
                + ("cannot be told" if auc.p_value is None else f"= {auc.p_value:.3g}"),
                f"  accuracy  {accuracy.first:.4f} and {accuracy.second:.4f}; right alone: the "
                f"first {accuracy.only_first_right} times, the second "
                f"{accuracy.only_second_right}, McNemar p = {accuracy.p_value:.3g}",
                *self._clustered(),
                NOTICE,
            ]
        )

    def _clustered(self) -> list[str]:
        found = self.clustered
        if found is None:
            return []
        return [
            f"  some of the {found.patients} patients have several films, which DeLong and McNemar "
            "take for independent",
            f"  over patients: AUC difference {self.auc.difference:+.4f}"
            + _told(found.auc_ci_low, found.auc_ci_high)
            + f", accuracy difference {self.accuracy.difference:+.4f}"
            + _told(found.accuracy_ci_low, found.accuracy_ci_high),
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
    positive = _positive_class(first)
    positive_N = (both["label"] == positive).to_numpy()
    if positive_N.all() or not positive_N.any():
        raise UserError(f"the shared images are all, or none of them, {positive}")
    column = class_column("p", positive)
    scores_N2 = both[[column, f"{column}_second"]].to_numpy(np.float64)
    right_N2 = np.stack(
        [
            (both[name] == both["label"]).to_numpy()
            for name in ("predicted_label", "predicted_label_second")
        ],
        axis=1,
    )
    return Comparison(
        first_model=str(one["model_id"].iloc[0]),
        second_model=str(other["model_id"].iloc[0]),
        images=len(both),
        positive_class=positive,
        synthetic=bool(both["synthetic"].any() or both["synthetic_second"].any()),
        auc=auc_difference(positive_N, scores_N2[:, 0], scores_N2[:, 1]),
        accuracy=accuracy_difference(right_N2),
        clustered=clustered_difference(positive_N, scores_N2, right_N2, _patients(both)),
    )


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
    # The variance of a difference of paired components is that of the differences.
    error = math.sqrt(
        of_positives.var(ddof=1) / len(of_positives) + of_negatives.var(ddof=1) / len(of_negatives)
    )
    if error == 0:
        # Two models that rank all alike; or a difference that is the same with every film left
        # out, of which the spread that the test rests on cannot be told.
        same = difference == 0
        return AucDifference(first, second, difference, None, None, 1.0 if same else None)
    p_value = 2 * NormalDist().cdf(-abs(difference) / error)
    half = _Z_95 * error
    return AucDifference(first, second, difference, difference - half, difference + half, p_value)


def accuracy_difference(right_N2: npt.NDArray[np.bool_]) -> AccuracyDifference:
    """McNemar's exact test; a column a model: whether it is right."""
    only_first = int((right_N2[:, 0] & ~right_N2[:, 1]).sum())
    only_second = int((right_N2[:, 1] & ~right_N2[:, 0]).sum())
    differ = only_first + only_second
    p_value = float(binomtest(only_first, differ).pvalue) if differ else 1.0
    first, second = right_N2.mean(axis=0)
    return AccuracyDifference(float(first), float(second), only_first, only_second, p_value)


def clustered_difference(
    positive_N: npt.NDArray[np.bool_],
    scores_N2: Floats,
    right_N2: npt.NDArray[np.bool_],
    resampling: Resampling,
) -> ClusteredDifference | None:
    """The differences with patients drawn anew; a column a model. None without clusters."""
    if not resampling.clustered:
        return None
    aucs, accuracies = [], []
    gained_N = right_N2[:, 1].astype(np.float64) - right_N2[:, 0]
    for weights_RN in resampling.weights():
        first_R, second_R = (
            weighted_auc(positive_N, scores_N, weights_RN) for scores_N in scores_N2.T
        )
        aucs.append(second_R - first_R)
        accuracies.append(weights_RN @ gained_N / weights_RN.sum(axis=1))
    return ClusteredDifference(
        resampling.patients,
        *percentile_interval(np.concatenate(aucs)),
        *percentile_interval(np.concatenate(accuracies)),
        resampling.described(),
    )


def _patients(both: pd.DataFrame) -> Resampling:
    """As either report numbers them; the number of one means nothing in the other."""
    for column in ("patient_cluster", "patient_cluster_second"):
        if column in both:
            numbers = both[column]
            return Resampling.of([None if pd.isna(n) else str(n) for n in numbers])
    return Resampling.of([None] * len(both))


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


def _positive_class(report: str) -> str:
    try:
        return str(json.loads(open_store(report).read("evaluation.json"))["positive_class"])
    except (ImageError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{report}/evaluation.json cannot be read; evaluate again") from error
