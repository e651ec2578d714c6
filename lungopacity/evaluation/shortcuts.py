"""What tells the label of a film without a look at the lungs: the view, the scanner, the border.

Each fact is tried on films of other patients than it was counted on, and its AUC has an interval
over patients (`bootstrap`). Array names carry their shape: N images, R replicates, H height, W
width, F pixels.
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
from lungopacity.evaluation.bootstrap import Resampling, percentile_interval, weighted_auc
from lungopacity.evaluation.metrics import age_band, roc_auc
from lungopacity.progress import Progress

log = logging.getLogger(__name__)

_BORDER = 0.15
"""Of the film's side, on each of the four sides, is what the border probe sees."""
_FOLDS = 5


@dataclass(frozen=True)
class Shortcut:
    """How well one fact alone tells a class from the rest, on films it has not seen."""

    fact: str
    class_name: str
    values: int
    auc: float
    ci_low: float | None
    ci_high: float | None
    n: int
    ci_method: str | None
    """Of the interval; None where there is none."""


def shortcuts_of(
    data: LabelledPixels,
    class_name: str,
    told: pd.DataFrame,
    resampling: Resampling,
) -> Iterator[Shortcut]:
    """Of each fact that differs between the films.

    class_name: which is told from the others. told: what the labels alone tell, a column a fact
    and a row a film. resampling: of their patients.
    """
    positive_N = data.labels_N == data.class_names.index(class_name)
    if not positive_N.any() or positive_N.all():
        return
    frame = data.images

    def tried(fact: str, values: int, known: int, scores_N: npt.NDArray[np.float64]) -> Shortcut:
        drawn = [weighted_auc(positive_N, scores_N, weights) for weights in resampling.weights()]
        low, high = percentile_interval(np.concatenate(drawn))
        auc, method = roc_auc(positive_N, scores_N).value, None if low is None else "bootstrap"
        return Shortcut(fact, class_name, values, auc, low, high, known, method)

    patients = frame["patient_id"].fillna("image " + frame["image"]).to_numpy(str)
    if len(set(patients)) < 2 or len(frame) < 3:
        log.warning("too few patients or films: nothing can be tried on others")
        return
    for fact, values in _facts(frame, told).items():
        known_N = np.array([value is not None for value in values])
        if len({value for value in values if value is not None}) < 2:
            continue
        scores_N, seen = _rates(values, positive_N, patients)
        yield tried(fact, seen, int(known_N.sum()), scores_N)
    of_kind = (len(set(patients[positive_N])), len(set(patients[~positive_N])))
    if min(of_kind) < 2:
        log.warning(
            "one patient has all films of a kind: the border alone cannot be tried on others"
        )
        return
    title = f"Reading borders for {class_name}"
    scores_N = _border_scores(data.pixels_NHW, positive_N, patients, title)
    yield tried("border of the film alone", 0, len(positive_N), scores_N)


def _facts(frame: pd.DataFrame, told: pd.DataFrame) -> dict[str, list[str | None]]:
    """What is known of each film beside its pixels, None where it is not."""

    def words(values: pd.Series) -> list[str | None]:
        return [None if pd.isna(value) else str(value) for value in values]

    ages = pd.to_numeric(frame["patient_age_years"], errors="coerce")
    read: dict[str, list[str | None]] = {
        "view_position": words(frame["view_position"]),
        "patient_sex": words(frame["patient_sex"]),
        "age": [None if pd.isna(age) else age_band(float(age)) for age in ages],
        # Loose films are objects of their own, and say nothing of each other.
        "shard": words(frame["source"]) if frame["source"].nunique() < len(frame) / 2 else [],
        "format": words(frame["format"]),
        "rows x columns": [
            f"{rows} x {columns}"
            for rows, columns in zip(frame["rows"], frame["columns"], strict=True)
        ],
        "photometric_interpretation": words(frame["photometric_interpretation"]),
    }
    # A `format` of the labels is not the files'.
    further = {
        f"{name} of the labels" if name in read else str(name): words(told[name]) for name in told
    }
    return further | read


def _folds(
    positive_N: npt.NDArray[np.bool_], patients: npt.NDArray[np.str_]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Training and test rows. Each fold has a patient of either kind to be tried on, if there are
    as many."""
    from sklearn.model_selection import StratifiedGroupKFold

    of_kind = (len(set(patients[positive_N])), len(set(patients[~positive_N])))
    count = max(2, min(_FOLDS, *of_kind))
    folds = StratifiedGroupKFold(n_splits=count, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        # A single film of a kind is in one fold alone.
        warnings.filterwarnings("ignore", "The least populated class")
        yield from list(folds.split(positive_N, positive_N, patients))


def _rates(
    values: Sequence[str | None],
    positive_N: npt.NDArray[np.bool_],
    patients: npt.NDArray[np.str_],
) -> tuple[npt.NDArray[np.float64], int]:
    """For each film the share of positives among other patients' films of the same value."""
    named = pd.Series(["unknown" if value is None else value for value in values])
    scores_N = np.zeros(len(named))
    for train, test in _folds(positive_N, patients):
        share = pd.Series(positive_N[train]).groupby(named.iloc[train].to_numpy()).mean()
        mean = float(positive_N[train].mean())
        scores_N[test] = named.iloc[test].map(share).fillna(mean)
    return scores_N, int(named.nunique())


def _border_scores(
    pixels_NHW: npt.NDArray[np.uint8],
    positive_N: npt.NDArray[np.bool_],
    patients: npt.NDArray[np.str_],
    title: str,
) -> npt.NDArray[np.float64]:
    """Of a logistic regression that sees the border alone, on patients that it has not seen.
    title: of the progress."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    side = pixels_NHW.shape[1]
    width = round(_BORDER * side)
    border_HW = np.ones((side, side), bool)
    border_HW[width:-width, width:-width] = False
    seen_NF = pixels_NHW[:, border_HW].astype(np.float32)
    scores_N = np.zeros(len(positive_N))
    folds = list(_folds(positive_N, patients))
    with Progress(title, len(folds), "folds", quick=True) as progress:
        for train, test in folds:
            if len(set(positive_N[train])) < 2:
                continue  # nothing to be learnt from
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
            probe.fit(seen_NF[train], positive_N[train])
            scores_N[test] = probe.decision_function(seen_NF[test])
            progress.advance(1)
    return scores_N
