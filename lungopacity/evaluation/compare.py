"""Compare two models on the same films: which is better, and whether the difference may be chance.

* AUC: DeLong, DeLong & Clarke-Pearson 1988, Biometrics 44:837, for two correlated curves; by
  midranks, in O(n log n) (Sun & Xu 2014, IEEE Signal Processing Letters 21:1389).
* Accuracy, sensitivity and specificity: the exact test of McNemar 1947, Psychometrika 12:153, on
  the films that one of the two gets right and the other wrong. The interval of the difference is
  Tango's (`metrics.paired_difference_interval`), because the bootstrap is too narrow where the
  models differ on a handful of films.

Both tests treat every film as a patient of its own. If patients have several films, the difference
in AUC also gets an interval from the bootstrap over patients (`bootstrap`), which draws the same
patients for both models; and Tango's interval is that of an effective sample: all counts divided by
the design effect (Rao & Scott 1992, Biometrics 48:577), whose variance over patients is that of
Obuchowski 1998, Statistics in Medicine 17:1495. In simulations of 100 and 300 patients with one to
three films each, of which 4 to 20 decide between the models, it held the true difference in 93 to
99 of 100 samples, and the bootstrap in 79 to 96.
"""

from __future__ import annotations

import io
import json
import logging
import math

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import binomtest

from lungopacity.errors import ErrorCode, ImageError, UserError
from lungopacity.evaluation.bootstrap import (
    Resampling,
    percentile_interval,
    weighted_auc,
)
from lungopacity.evaluation.comparison import (
    AucDifference,
    ClusteredDifference,
    Comparison,
    ShareDifference,
)
from lungopacity.evaluation.effective_sample import design_effect
from lungopacity.evaluation.metrics import Z_95, Floats, paired_difference_interval
from lungopacity.results.schema import class_column
from lungopacity.storage import open_store

log = logging.getLogger(__name__)

_ROUNDING = 1e-12
"""Rounding error of a share in float64. Different shares of n films differ by at least 1 / 2n."""
_COLUMNS = {"image", "label", "predicted_label", "model_id", "synthetic"}
"""Required columns of a report's predictions.parquet, besides a score for each class."""
Share = tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]
"""(N, 2) the films that each model gets right, and (N,) the films that the share is out of."""


def compare(first: str, second: str) -> Comparison:
    """Compare two reports of `evaluate` on the images that they share. first, second: their URIs.

    Raises `UserError` if a report cannot be read, if the reports differ in their classes, or in the
    label or the bytes of an image, if they share no image, or if the shared images are all of the
    positive class, or none is.
    """
    one, other = _read(first), _read(second)
    classes = [{name for name in frame.columns if name.startswith("p_")} for frame in (one, other)]
    if classes[0] != classes[1]:
        raise UserError(f"{first} and {second} are of models with different classes")
    both = one.merge(other, on="image", suffixes=("", "_second"))
    if both.empty:
        raise UserError(f"{first} and {second} share no image; evaluate both on the same split")
    if "content_sha256_second" in both:
        # Reports of older versions lack this column.
        others = both.loc[both["content_sha256"] != both["content_sha256_second"], "image"]
        if len(others):
            raise UserError(
                f"{first} and {second}: {len(others)} of {len(both)} images with the same name "
                f"have different bytes, such as {others.iloc[0]}; evaluate both on the same films"
            )
    if (both["label"] != both["label_second"]).any():
        raise UserError(f"{first} and {second} label some images differently; use the same labels")
    positive, decided_at, picked_on, known = _facts(first)
    other_positive, other_decided_at, other_picked_on, other_known = _facts(second)
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
        which = "all" if positive_N.all() else "none"
        raise UserError(
            f"{which} of the images that the reports share are {positive}; evaluate both on films "
            "of either kind"
        )
    column = class_column("p", positive)
    scores_N2 = both[[column, f"{column}_second"]].to_numpy(np.float64)
    resampling = _patients(both)
    differences = {
        name: share_difference(right_N2[of_N], resampling.rows(np.flatnonzero(of_N)))
        for name, (right_N2, of_N) in _shares_of(both, positive_N).items()
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
        first_known=known,
        second_known=other_known,
        synthetic=bool(both["synthetic"].any() or both["synthetic_second"].any()),
        auc=auc_difference(positive_N, scores_N2[:, 0], scores_N2[:, 1]),
        accuracy=differences["accuracy"],
        sensitivity=differences.get("sensitivity"),
        specificity=differences.get("specificity"),
        clustered=clustered_difference(positive_N, scores_N2, resampling),
    )


def _shares_of(both: pd.DataFrame, positive_N: npt.NDArray[np.bool_]) -> dict[str, Share]:
    """Accuracy; if both reports have decisions, also sensitivity and specificity."""
    predicted_N2 = both[["predicted_label", "predicted_label_second"]].to_numpy()
    right_N2 = predicted_N2 == both["label"].to_numpy()[:, None]
    shares = {"accuracy": (right_N2, np.ones_like(positive_N))}
    if {"decision", "decision_second"} <= set(both):
        # A film under review does not count as positive, as in `decision_shares`.
        called_N2 = both[["decision", "decision_second"]].to_numpy() == "positive"
        shares["sensitivity"] = called_N2, positive_N
        shares["specificity"] = ~called_N2, ~positive_N
    return shares


def auc_difference(
    positive_N: npt.NDArray[np.bool_], first_N: Floats, second_N: Floats
) -> AucDifference:
    """DeLong's test of two models' scores of the same images; scores are higher for positives."""
    (above, below), (second_above, second_below) = (
        _components(positive_N, scores_N) for scores_N in (first_N, second_N)
    )
    first, second = float(above.mean()), float(second_above.mean())
    of_positives, of_negatives = second_above - above, second_below - below
    difference = second - first
    if len(of_positives) < 2 or len(of_negatives) < 2:
        return AucDifference(first, second, difference, None, None, None)
    if max(np.ptp(of_positives), np.ptp(of_negatives)) < _ROUNDING:
        # Either both models rank all films alike; or leaving out any film gives the same
        # difference, so that its spread, which the test needs, cannot be estimated.
        same = abs(difference) < _ROUNDING
        return AucDifference(first, second, difference, None, None, 1.0 if same else None)
    # The components are paired, so the variance of the difference is that of their differences.
    error = math.sqrt(
        of_positives.var(ddof=1) / len(of_positives) + of_negatives.var(ddof=1) / len(of_negatives)
    )
    # Not `NormalDist.cdf`, which is 0 from 8.3 standard errors on.
    p_value = math.erfc(abs(difference) / error / math.sqrt(2))
    half = Z_95 * error
    return AucDifference(first, second, difference, difference - half, difference + half, p_value)


def _components(
    positive_N: npt.NDArray[np.bool_], scores_N: Floats
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """DeLong's components: for each positive, the share of negatives that score below it, whose
    mean is the AUC, and for each negative, the share of positives above it. Equal scores count
    half. There must be positives and negatives."""
    positives, negatives = scores_N[positive_N], scores_N[~positive_N]
    m, n = len(positives), len(negatives)
    ranks = _midranks(np.concatenate([positives, negatives]))
    return (ranks[:m] - _midranks(positives)) / n, 1 - (ranks[m:] - _midranks(negatives)) / m


def _midranks(values: Floats) -> npt.NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: npt.NDArray[np.float64] = (counts.cumsum() - (counts - 1) / 2)[which]
    return ranks


def share_difference(right_N2: npt.NDArray[np.bool_], resampling: Resampling) -> ShareDifference:
    """McNemar's exact test, and an interval over patients. right_N2: whether each model (a column)
    is right on each film, at least one. resampling: the films' patients."""
    only_first = int((right_N2[:, 0] & ~right_N2[:, 1]).sum())
    only_second = int((right_N2[:, 1] & ~right_N2[:, 0]).sum())
    differ = only_first + only_second
    p_value = float(binomtest(only_first, differ).pvalue) if differ else 1.0
    first, second = (float(share) for share in right_N2.mean(axis=0))
    gained_N = right_N2[:, 1].astype(np.float64) - right_N2[:, 0]
    effect = design_effect(gained_N - gained_N.mean(), resampling.patient_N)
    low, high = paired_difference_interval(
        only_first / effect, only_second / effect, len(right_N2) / effect
    )
    return ShareDifference(
        first, second, second - first, low, high, only_first, only_second, p_value
    )


def clustered_difference(
    positive_N: npt.NDArray[np.bool_], scores_N2: Floats, resampling: Resampling
) -> ClusteredDifference | None:
    """The bootstrap interval over patients of the difference in AUC. scores_N2: a column per model.
    None if every patient has one film."""
    if not resampling.clustered:
        return None
    drawn = []
    for weights_RN in resampling.weights():
        first_R, second_R = (
            weighted_auc(positive_N, scores_N, weights_RN) for scores_N in scores_N2.T
        )
        drawn.append(second_R - first_R)
    low, high = percentile_interval(np.concatenate(drawn))
    return ClusteredDifference(resampling.patients, low, high, resampling.described())


def _patients(both: pd.DataFrame) -> Resampling:
    """The patients, as numbered by the report that groups the films into fewer patients: the other
    report's labels may have had no patient ids. The two numberings are unrelated."""
    known = [
        Resampling.of([None if pd.isna(n) else str(n) for n in both[column]])
        for column in ("patient_cluster", "patient_cluster_second")
        if column in both
    ]
    return min(known, key=lambda one: one.patients, default=Resampling.of([None] * len(both)))


def _read(report: str) -> pd.DataFrame:
    try:
        data = open_store(report).read("predictions.parquet")
        frame = pd.read_parquet(io.BytesIO(data))
        if _COLUMNS - set(frame.columns):
            raise ValueError("not the predictions of an evaluation")
    except (ImageError, OSError, ValueError) as error:
        if isinstance(error, ImageError) and error.code is not ErrorCode.MISSING:
            raise UserError(
                f"{report}: the report cannot be read ({error.message}); {error.advice}"
            ) from error
        raise UserError(
            f"{report}: no report there; give the --output of `lungopacity evaluate`"
        ) from error
    return frame


def _facts(report: str) -> tuple[str, str | None, int, int]:
    """The report's positive class, the name of its operating point (None if not recorded), and the
    numbers of its films that the point was picked on and that the model knows."""
    try:
        facts = json.loads(open_store(report).read("evaluation.json"))
        positive, decided_at = str(facts["positive_class"]), facts.get("decided_at")
        picked_on = facts.get("picked_on", {}).get(decided_at, 0)
        return positive, decided_at, picked_on, facts.get("known_to_model", 0)
    except (ImageError, ValueError, TypeError, KeyError) as error:
        fix = "; evaluate again"
        if isinstance(error, ImageError) and error.code is not ErrorCode.MISSING:
            fix = f" ({error.message}); {error.advice}"
        raise UserError(f"{report}/evaluation.json cannot be read{fix}") from error
