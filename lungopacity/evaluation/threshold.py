"""A new operating point of a model: picked from what a site has screened and labelled, or by
another rule from the validation films, kept in the model folder, and of use to this model alone."""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

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
)
from lungopacity.evaluation.table import decision_words
from lungopacity.models import (
    ModelSpec,
    OperatingPoint,
    TrainedModel,
    films_known_to,
    load_model,
    read_validation,
    save_operating_point,
)
from lungopacity.results.query import query
from lungopacity.results.schema import class_column
from lungopacity.results.workbench import quoted

log = logging.getLogger(__name__)

_MOST_TOLD = 5
_FILM = ["archive", "object", "member_index"]


@dataclass(frozen=True)
class PickedPoint(OperatingPoint):
    """An operating point, and how sure its figures are."""

    metrics: tuple[Metric, ...] = ()
    """Of the decisions on the images that it was picked on, with intervals over patients."""
    intervals: str = ""
    """How they were made."""
    unknown_patients: int = 0
    """Images of no known patient; each counts as one."""
    left_out: int = 0
    """Labelled images that the model learnt from or was chosen by."""
    of_no_class: Mapping[str, int] = field(default_factory=dict)
    """Images by a label that means no class of the model: the figures do not count them."""
    unscored: int = 0
    """Labelled images that were rejected, or could not be read."""
    absent: int = 0
    """Images of the labels file that the results do not have: no run of theirs met them."""

    def summary(self) -> str:
        """Where it decides, and what that achieved."""
        review = "" if self.review_from is None else f", review from {self.review_from:.4f}"
        shares, *with_review = decision_words(self.metrics)
        unknown = self.unknown_patients
        return "\n".join(
            [
                f"positive from {self.threshold:.4f}{review}; {shares} on {self.images} films",
                *(f"with those under review: {words}" for words in with_review),
                f"95 % intervals: {self.intervals}"
                + (f"; {unknown} films name no patient" if unknown else "")
                + "; of the films that it was picked on: `evaluate` measures it on others",
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
) -> PickedPoint:
    """Pick by `rule` and keep under `name` in the model folder; screen with it by that name.

    results: URI of a results folder, of which this model's newest scores of each image count, or
    those of one `run_id`; None: the validation films that the model folder keeps, as the points of
    training are picked. `labels`: a labels file; None takes the labels that the runs were given.
    Of a results folder, films that the model learnt from or was chosen by are left out, and those
    whose label is of no class of it; both are counted, with those that have no score, and images of
    the labels file that no run has met. Who a patient is, `patient_id` of the labels tells, or else
    `patient_hmac`. Raises `UserError` where no scores of this model have labels, or less than
    `FEWEST_IMAGES` films are of either kind, where the name is taken, or the rule is none.
    """
    check_rule(rule)
    trained = load_model(model)
    if results is None and not (run_id is None and labels is None):
        raise UserError("--run-id and --labels belong to --results: give it, or leave them out")
    films = _films(model, trained, results, run_id, labels)
    positive_N, positive = films.positive_N, trained.spec.positive_class
    _check_enough(films, trained.spec)
    # In float64, as a decision is made: a threshold may lie between two scores of float32.
    p_N = films.rows["p"].to_numpy(np.float64)
    point = pick(rule, p_N, positive_N, films.where)
    resampling = Resampling.of(films.rows["patient"].tolist())
    _warn_of_few_patients(positive_N, resampling, positive)
    shares = decision_shares(p_N, positive_N, point)
    metrics = ratio_metrics({(what, name): share for what, share in shares.items()}, resampling)
    picked_on = [] if results is None else films.rows["content_sha256"].tolist()
    save_operating_point(model, trained, name, point, picked_on)
    return PickedPoint(
        **vars(point),
        metrics=tuple(metrics),
        intervals=resampling.described(),
        unknown_patients=int(films.rows["patient"].isna().sum()),
        left_out=films.left_out,
        of_no_class=films.of_no_class,
        unscored=films.unscored,
        absent=films.absent,
    )


@dataclass(frozen=True)
class _Films:
    """What a threshold is picked on, and what of the labelled films is not."""

    rows: pd.DataFrame
    """`label`, `p` of the positive class and `patient`, a row a film."""
    positive_N: npt.NDArray[np.bool_]
    """Whether its class is the positive one."""
    whose: str
    """Which films they are, for a message."""
    where: str
    """The same, for `chosen_by`."""
    left_out: int
    of_no_class: dict[str, int]
    unscored: int
    absent: int
    """These four as in `PickedPoint`."""


def _not_counted(films: PickedPoint | _Films) -> list[str]:
    """A line, if labelled films are in no figure."""
    several = sorted(films.of_no_class.items(), key=lambda item: -item[1])
    words = [f"{count} labelled {shown(label)}" for label, count in several[:_MOST_TOLD]]
    rest = sum(count for _, count in several[_MOST_TOLD:])
    words += [f"{rest} of other labels"] if rest else []
    words += [f"{films.left_out} that the model knows"] if films.left_out else []
    words += [f"{films.unscored} rejected or unreadable"] if films.unscored else []
    words += [f"{films.absent} that the results do not have"] if films.absent else []
    return [f"labelled films not counted: {', '.join(words)}"] if words else []


def _films(
    model: str, trained: TrainedModel, results: str | None, run_id: str | None, labels: str | None
) -> _Films:
    """Those with a score and a class, but for what the model knows; what is left out is told."""
    spec, unscored, absent = trained.spec, 0, 0
    if results is None:
        films, whose = _validation(model, trained), f"{model}: of its validation films"
    else:
        films, absent = _labelled(trained, results, run_id, labels)
        whose = f"{results}: of the films that {trained.model_id} scored"
        films, unscored = _with_scores(films)
    of_class = films["label"].isin(list(spec.class_of_label))
    of_no_class = dict(Counter(films.loc[~of_class, "label"]))
    if of_no_class or unscored:
        log.warning(
            "left out: %d films whose label is of no class of the model, %d labelled films that "
            "were rejected or could not be read",
            sum(of_no_class.values()),
            unscored,
        )
    rows = films[of_class]
    known = rows["content_sha256"].isin([] if results is None else list(films_known_to(model)))
    left_out, rows = int(known.sum()), rows[~known]
    if left_out:
        log.warning(
            "the model learnt from or was chosen by %d of %d labelled films: they are left out",
            left_out,
            left_out + len(rows),
        )
    positive_N = (rows["label"].map(spec.class_of_label) == spec.positive_class).to_numpy(bool)
    where = f"{len(rows)} films of {results}" + (f", run {run_id}" if run_id else "")
    if results is None:
        where = "validation"
    return _Films(rows, positive_N, whose, where, left_out, of_no_class, unscored, absent)


def _with_scores(films: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The frames that have one, and how many films have none in any frame."""
    scored = films["p"].notna()
    by_film = scored.groupby([films[name] for name in _FILM], dropna=False)
    return films[scored], int((~by_film.any()).sum())


def _check_enough(films: _Films, spec: ModelSpec) -> None:
    """Raises `UserError` for less than `FEWEST_IMAGES` films of either kind."""
    counts = (int(films.positive_N.sum()), int((~films.positive_N).sum()))
    if min(counts) < FEWEST_IMAGES:
        raise UserError(
            films.whose
            + (", but did not learn from," if films.left_out else "")
            + f" {counts[0]} are labelled {spec.positive_class} and {counts[1]} otherwise; "
            + "; ".join([f"{FEWEST_IMAGES} of each are needed", *_not_counted(films)])
            + (
                f"; the model knows the labels {', '.join(spec.class_of_label)}"
                if films.of_no_class
                else ""
            )
        )


def _warn_of_few_patients(
    positive_N: npt.NDArray[np.bool_], resampling: Resampling, positive: str
) -> None:
    patients = [len(set(resampling.patient_N[kind_N])) for kind_N in (positive_N, ~positive_N)]
    if min(patients) < FEWEST_IMAGES:
        log.warning(
            "the films are of %d patients with %s and %d without: of fewer than %d, a threshold is "
            "mostly chance",
            patients[0],
            positive,
            patients[1],
            FEWEST_IMAGES,
        )


def _labelled(
    trained: TrainedModel, results: str, run_id: str | None, labels: str | None
) -> tuple[pd.DataFrame, int]:
    """`name`, `content_sha256`, `patient`, `label` and `p` of the positive class, null of a film
    without a score, as a data frame; one row a frame. `_FILM` says which frames are of one film.
    And how many images of the labels file the results do not have."""
    column = class_column("p", trained.spec.positive_class)
    of_runs = f"model_id = {quoted(trained.model_id)}"
    if run_id is not None:
        of_runs += f" AND run_id = {quoted(run_id)}"
    chosen = of_runs if labels is not None else f"{of_runs} AND label IS NOT NULL"
    frame: pd.DataFrame = query(
        results,
        "SELECT coalesce(any_value(member), image) AS name, archive, image AS object, "
        "member_index, arg_max(label, place) AS label, "
        "arg_max(content_sha256, place) FILTER (status = 'ok') AS content_sha256, "
        "arg_max(patient_hmac, place) AS patient, "
        f"arg_max({column}, place) AS p FROM ("
        # The order of publishing: clocks are set back, and differ between machines.
        "SELECT predictions.*, place FROM predictions JOIN internal.places USING (run_id) "
        f"WHERE {chosen} "
        # Of what the object holds now: an older film's score is none of the one that followed.
        "QUALIFY source_etag = first_value(source_etag) "
        "OVER (PARTITION BY archive, image ORDER BY place DESC)"
        ") GROUP BY archive, image, member_index, frame",
    ).to_pandas()
    if frame["p"].isna().all():
        raise UserError(
            f"{results}: has no scores of model {trained.model_id}"
            + (" with labels" if labels is None else "")
            + (f" in run '{run_id}'" if run_id else "")
            + "; screen with it first and see `lungopacity runs`"
            + (", or give --labels" if labels is None else "")
        )
    if labels is None:
        return frame, 0
    told = read_labels(labels)[["image", "label", "patient_id"]]
    name_of = label_names(frame["name"], told["image"], labels, results)
    called = pd.Series([name_of.get(name) for name in frame["name"]], dtype=object)
    both = frame.drop(columns="label").assign(image=called)
    both = both.merge(told, on="image")
    if both.empty:
        hashed = _names_are_hashed(results, of_runs)
        raise UserError(
            f"{labels}: names none of the {frame['p'].count()} films that {trained.model_id} "
            "scored; "
            + (
                f"in {results} names are hashed (--hash-keys): give the labels to `screen`, which "
                "joins them before it hashes, and leave --labels out here"
                if hashed
                else f"it names {told['image'].min()!r}, {results} {frame['name'].min()!r}"
            )
        )
    # Frames of one film share its name.
    films = both.drop_duplicates(_FILM)
    twice = films.loc[films["image"].duplicated(), "name"]
    if len(twice):
        raise UserError(
            f"{labels}: {len(twice)} names are each of several films of {results}, as "
            f"{twice.min()}; give the --run-id of one archive's run, or label by other names"
        )
    patient = both["patient_id"].where(both["patient_id"].notna(), both["patient"])
    return both.assign(patient=patient), len(told) - both["image"].nunique()


def _validation(model: str, trained: TrainedModel) -> pd.DataFrame:
    """The same frame of the validation films; the folder does not say whose they are."""
    spec = trained.spec
    kept = pd.read_parquet(io.BytesIO(read_validation(model)))
    logits_VK = kept[[f"logit_{name}" for name in spec.class_names]].to_numpy()
    p_V = spec.probabilities(logits_VK)[:, spec.positive_index]
    return kept[["content_sha256", "label"]].assign(p=p_V, patient=None)


def _names_are_hashed(results: str, of_runs: str) -> bool:
    """Whether a run that fits the condition hashed them."""
    records = query(results, f"SELECT record FROM runs WHERE {of_runs}")["record"].to_pylist()
    settings = [json.loads(record).get("settings", {}) for record in records]
    return any(one.get("key_map") is not None for one in settings)
