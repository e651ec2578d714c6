"""Pick a new operating point of a model, from films that a site has screened and labelled, or by
another rule from the validation films. It is kept in the model folder and is valid only for this
model."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from lungopacity.dataset.manifest import label_names, read_labels, shown
from lungopacity.errors import UserError
from lungopacity.evaluation.bootstrap import Resampling
from lungopacity.evaluation.measure import ratio_metrics
from lungopacity.evaluation.metrics import Metric
from lungopacity.evaluation.operating_points import (
    FEWEST_IMAGES,
    check_rule,
    decision_shares,
    pick,
    thresholds,
)
from lungopacity.evaluation.table import decision_words
from lungopacity.models import (
    ModelSpec,
    OperatingPoint,
    TrainedModel,
    films_known_to,
    load_model,
    save_operating_point,
    validation_films,
)
from lungopacity.results.query import query
from lungopacity.results.schema import class_column
from lungopacity.results.workbench import quoted

log = logging.getLogger(__name__)

_MOST_LISTED = 5


@dataclass(frozen=True)
class PickedPoint(OperatingPoint):
    """An operating point, with its metrics and the films that were not counted."""

    metrics: tuple[Metric, ...] = ()
    """Of the decisions on the images that it was picked on, with intervals over patients."""
    intervals: str = ""
    """How the intervals were computed."""
    unknown_patients: int = 0
    """Images without a known patient; each counts as a patient."""
    left_out: int = 0
    """Labelled images that the model was trained, selected or calibrated on."""
    of_no_class: Mapping[str, int] = field(default_factory=dict)
    """Number of images by label, for labels that stand for no class of the model. Not counted."""
    unscored: int = 0
    """Labelled images that were rejected, or could not be read."""
    of_several_images: int = 0
    """Labelled files that hold several images each, any of which the label may mean."""
    absent: int = 0
    """Images of the labels file that are not in the results."""

    def summary(self) -> str:
        """The thresholds, and the metrics of the decisions."""
        shares, *with_review = decision_words(self.metrics)
        unknown = self.unknown_patients
        return "\n".join(
            [
                f"{thresholds(self)}; {shares} on {self.images} films",
                *(
                    f"{view} views: sensitivity {of.sensitivity:.4f}, specificity "
                    f"{of.specificity:.4f} on {of.images} films"
                    for view, of in self.by_view.items()
                ),
                *(f"review counted as found: {words}" for words in with_review),
                f"95 % intervals: {self.intervals}"
                + (f"; {unknown} films have no known patient" if unknown else "")
                + "; on the films that it was picked on: use `evaluate` to measure it on others",
                *_not_counted(self),
            ]
        )


def threshold(
    model: str,
    results: str | None,
    rule: str,
    name: str,
    *,
    run_id: str | None = None,
    labels: str | None = None,
    by_view: bool = False,
) -> PickedPoint:
    """Pick an operating point by `rule`, and keep it as `name` in the model folder.

    `by_view`: pick thresholds for each view that headers state (of validation films, labels or
    headers), too; films of other views, and of none, are decided by the thresholds that are picked
    on all films.

    results: URI of a results folder. The model's newest score of each image counts, or that of
    `run_id`. None takes the validation films that the model folder keeps, as training does for its
    points. `labels`: a labels file; None takes the labels that the runs were given. Patients are
    told apart by `patient_id` of the labels, or else `patient_hmac`.

    Left out, and counted in the result: films of the results that the model was trained, selected
    or calibrated on, films whose label is of no class, films without a score, files of several
    images (which `evaluate` refuses), and images of the labels file that are not in the results.
    Raises `UserError` if no scores of this model have labels, if there are fewer than
    `FEWEST_IMAGES` films of either kind (with `by_view`: if no view has as many), if the name is
    taken, or for an unknown rule.
    """
    check_rule(rule)
    trained = load_model(model)
    if results is None and not (run_id is None and labels is None):
        raise UserError("--run-id and --labels belong to --results: give it, or leave them out")
    films = _films(model, trained, results, run_id, labels)
    positive_N, positive = films.positive_N, trained.spec.positive_class
    _check_enough(films, trained.spec)
    # In float64, as in decisions: a threshold may lie between two neighbouring float32 scores.
    p_N = films.rows["p"].to_numpy(np.float64)
    point = pick(rule, p_N, positive_N, films.where)
    views = [None if pd.isna(view) else str(view) for view in films.rows["view"]]
    if by_view:
        point = replace(point, by_view=_points_of_views(rule, p_N, films, views, positive))
    resampling = Resampling.of(films.rows["patient"].tolist())
    _warn_of_few_patients("the films", positive_N, ~positive_N, resampling, positive)
    for view in point.by_view:
        of_view_N = np.array(views, dtype=object) == view
        kinds = positive_N & of_view_N, ~positive_N & of_view_N
        _warn_of_few_patients(f"the {view} views", *kinds, resampling, positive)
    shares = decision_shares(p_N, positive_N, point, views)
    metrics = ratio_metrics({(what, name): share for what, share in shares.items()}, resampling)
    picked_on = [] if results is None else films.rows["content_sha256"].tolist()
    save_operating_point(model, trained, name, point, picked_on)
    return PickedPoint(
        **vars(point),
        metrics=tuple(metrics),
        intervals=(
            f"Wilson's over an effective sample, of {resampling.patients:,} patients with "
            f"{len(positive_N):,} films"
        ),
        unknown_patients=int(films.rows["patient"].isna().sum()),
        left_out=films.left_out,
        of_no_class=films.of_no_class,
        unscored=films.unscored,
        of_several_images=films.of_several_images,
        absent=films.absent,
    )


def _points_of_views(
    rule: str,
    p_N: npt.NDArray[np.float64],
    films: _Films,
    views: list[str | None],
    positive: str,
) -> dict[str, OperatingPoint]:
    """A point for each view with enough films; a warning names the others. Raises `UserError` if
    there is none."""
    view_N = np.array(views, dtype=object)
    points, others = {}, []
    for view in sorted({view for view in views if view is not None}):
        of_view_N = view_N == view
        positive_N = films.positive_N[of_view_N]
        counts = int(positive_N.sum()), int((~positive_N).sum())
        if min(counts) >= FEWEST_IMAGES:
            where = f"{len(positive_N)} {view} views among {films.where}"
            points[view] = pick(rule, p_N[of_view_N], positive_N, where)
        else:
            others.append(f"{view} has {counts[0]} with {positive} and {counts[1]} without")
    unknown = views.count(None)
    others += [f"of {unknown} films no view is known"] if unknown else []
    if not points:
        raise UserError(
            f"--by-view: no view has {FEWEST_IMAGES} films with {positive} and {FEWEST_IMAGES} "
            f"without: {'; '.join(others)}; "
            + ("give --results of films with views, or " if films.where == "validation" else "")
            + "pick a point for all films, without --by-view"
        )
    if others:
        log.warning("decided by the threshold for all films: %s", "; ".join(others))
    return points


@dataclass(frozen=True)
class _Films:
    """The films that a threshold is picked on, and how many were left out."""

    rows: pd.DataFrame
    """`label`, `p` of the positive class, `patient`, `view` by the header and `content_sha256`, one
    row per film."""
    positive_N: npt.NDArray[np.bool_]
    """Whether the film's class is the positive one."""
    whose: str
    """The beginning of a message: which films they are."""
    where: str
    """Which films they are, for `chosen_by`."""
    left_out: int
    of_no_class: dict[str, int]
    unscored: int
    of_several_images: int
    absent: int
    """These five as in `PickedPoint`."""


def _not_counted(films: PickedPoint | _Films) -> list[str]:
    """A line about the labelled films that are not counted, if there are any."""
    several = sorted(films.of_no_class.items(), key=lambda item: -item[1])
    words = [f"{count} labelled {shown(label)}" for label, count in several[:_MOST_LISTED]]
    rest = sum(count for _, count in several[_MOST_LISTED:])
    words += [f"{rest} of other labels"] if rest else []
    words += [f"{films.left_out} that the model was trained on"] if films.left_out else []
    words += [f"{films.unscored} rejected or unreadable"] if films.unscored else []
    if films.of_several_images:
        words.append(
            f"{films.of_several_images} in files of several images, any of which the label may mean"
        )
    words += [f"{films.absent} that the results do not have"] if films.absent else []
    return [f"labelled films not counted: {', '.join(words)}"] if words else []


def _films(
    model: str, trained: TrainedModel, results: str | None, run_id: str | None, labels: str | None
) -> _Films:
    """The films that have a score and a class, and that the model was not trained, selected or
    calibrated on. Warnings count what is left out."""
    spec, unscored, of_several, absent = trained.spec, 0, 0, 0
    if results is None:
        films, whose = _validation(model, trained), f"{model}: of its validation films"
    else:
        films, absent = _labelled(trained, results, run_id, labels)
        whose = f"{results}: of the films that {trained.model_id} scored"
        of_several = int(films["is_of_several"].sum())
        films = films[~films["is_of_several"]]
        unscored = int(films["p"].isna().sum())
        films = films[films["p"].notna()]
    of_class = films["label"].isin(list(spec.class_of_label))
    of_no_class = dict(Counter(films.loc[~of_class, "label"]))
    if of_no_class or unscored:
        log.warning(
            "left out: %d films whose label is of none of the model's classes, and %d labelled "
            "films that were rejected or could not be read",
            sum(of_no_class.values()),
            unscored,
        )
    rows = films[of_class]
    known = rows["content_sha256"].isin([] if results is None else list(films_known_to(model)))
    left_out, rows = int(known.sum()), rows[~known]
    if left_out:
        log.warning(
            "left out: %d of %d labelled films, on which the model was trained, selected or "
            "calibrated",
            left_out,
            left_out + len(rows),
        )
    positive_N = (rows["label"].map(spec.class_of_label) == spec.positive_class).to_numpy(bool)
    where = f"{len(rows)} films of {results}" + (f", run {run_id}" if run_id else "")
    if results is None:
        where = "validation"
    return _Films(
        rows, positive_N, whose, where, left_out, of_no_class, unscored, of_several, absent
    )


def _check_enough(films: _Films, spec: ModelSpec) -> None:
    """Raises `UserError` for fewer than `FEWEST_IMAGES` films of either kind."""
    counts = (int(films.positive_N.sum()), int((~films.positive_N).sum()))
    if min(counts) < FEWEST_IMAGES:
        raise UserError(
            films.whose
            + (", but was not trained on," if films.left_out else "")
            + f" {counts[0]} are labelled {spec.positive_class} and {counts[1]} otherwise; "
            + "; ".join([f"{FEWEST_IMAGES} of each are needed", *_not_counted(films)])
            + (
                f"; the model knows the labels {', '.join(spec.class_of_label)}"
                if films.of_no_class
                else ""
            )
        )


def _warn_of_few_patients(
    films: str,
    positive_N: npt.NDArray[np.bool_],
    negative_N: npt.NDArray[np.bool_],
    resampling: Resampling,
    positive: str,
) -> None:
    """films: what the message calls the images that either mask marks."""
    patients = [len(set(resampling.patient_N[kind_N])) for kind_N in (positive_N, negative_N)]
    if min(patients) < FEWEST_IMAGES:
        log.warning(
            "%s are of %d patients with %s and %d without: with fewer than %d, a threshold is "
            "mostly chance",
            films,
            patients[0],
            positive,
            patients[1],
            FEWEST_IMAGES,
        )


def _labelled(
    trained: TrainedModel, results: str, run_id: str | None, labels: str | None
) -> tuple[pd.DataFrame, int]:
    """A data frame of labelled films, and the number of images in the labels file that are not in
    the results. Columns: `name`, `content_sha256`, `patient`, `view`, `label`, `p` of the positive
    class, null without a score, and `is_of_several`, whether the file holds several images, whose
    other values are then those of any of these. One row per file."""
    column = class_column("p", trained.spec.positive_class)
    of_runs = f"model_id = {quoted(trained.model_id)}"
    if run_id is not None:
        of_runs += f" AND run_id = {quoted(run_id)}"
    chosen = of_runs if labels is not None else f"{of_runs} AND label IS NOT NULL"
    frame: pd.DataFrame = query(
        results,
        "SELECT coalesce(any_value(member), image) AS name, arg_max(label, place) AS label, "
        "coalesce(max(frame), 0) > 0 AS is_of_several, "
        "arg_max(content_sha256, place) FILTER (status = 'ok') AS content_sha256, "
        "arg_max(patient_hmac, place) AS patient, "
        # By the header, as it is known when `screen` decides.
        "arg_max(view_position, place) FILTER (status = 'ok') AS view, "
        f"arg_max({column}, place) AS p FROM ("
        # `place` is the order of publishing: clocks differ between machines, and can be set back.
        "SELECT predictions.*, place FROM predictions JOIN internal.places USING (run_id) "
        f"WHERE {chosen} "
        # Only scores of the object's present content: it may have held another film before.
        "QUALIFY source_etag = first_value(source_etag) "
        "OVER (PARTITION BY archive, image ORDER BY place DESC)"
        ") GROUP BY archive, image, member_index",
    ).to_pandas()
    if frame["p"].isna().all():
        raise UserError(
            f"{results}: no scores of model {trained.model_id}"
            + (" with labels" if labels is None else "")
            + (f" in run '{run_id}'" if run_id else "")
            + "; screen with this model first (`lungopacity runs` lists the runs)"
            + (", or give --labels" if labels is None else "")
        )
    if labels is None:
        return frame, 0
    labelled = read_labels(labels)[["image", "label", "patient_id"]]
    name_of = label_names(frame["name"], labelled["image"], labels, results)
    called = pd.Series([name_of.get(name) for name in frame["name"]], dtype=object)
    both = frame.drop(columns="label").assign(image=called)
    both = both.merge(labelled, on="image")
    if both.empty:
        hashed = _names_are_hashed(results, of_runs)
        raise UserError(
            f"{labels}: names none of the {frame['p'].count()} films that {trained.model_id} "
            "scored; "
            + (
                f"in {results} names are hashed (--hash-keys): give the labels to `screen`, which "
                "joins them before it hashes, and leave --labels out here"
                if hashed
                else f"it names {labelled['image'].min()!r}, but {results} has "
                f"{frame['name'].min()!r}; use the names of the results"
            )
        )
    twice = both.loc[both["image"].duplicated(), "name"]
    if len(twice):
        raise UserError(
            f"{labels}: {len(twice)} names belong to several films of {results}, such as "
            f"{twice.min()}; give the --run-id of one archive's run, or use other names in the "
            "labels"
        )
    patient = both["patient_id"].where(both["patient_id"].notna(), both["patient"])
    return both.assign(patient=patient), len(labelled) - both["image"].nunique()


def _validation(model: str, trained: TrainedModel) -> pd.DataFrame:
    """Label, view, score and content_sha256 of the validation films. The model folder does not
    record their patients."""
    spec = trained.spec
    films, logits_VK = validation_films(model)
    p_V = spec.probabilities(logits_VK)[:, spec.positive_index]
    return films.rename(columns={"view_position": "view"}).assign(p=p_V, patient=None)


def _names_are_hashed(results: str, of_runs: str) -> bool:
    """Whether any run that fits the SQL condition hashed the names of objects."""
    records = query(results, f"SELECT record FROM runs WHERE {of_runs}")["record"].to_pylist()
    settings = [json.loads(record).get("settings", {}) for record in records]
    return any(one.get("key_map") is not None for one in settings)
