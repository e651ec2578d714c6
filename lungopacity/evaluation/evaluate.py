"""Measure a model on labelled images that it has not seen, and write the report."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from lungopacity.archive.content import settings_of_model
from lungopacity.dataset.manifest import (
    assign_splits,
    check_contents,
    check_patients,
    read_labels,
    select_classes,
)
from lungopacity.dataset.pixels import LabelledPixels, load_pixels
from lungopacity.errors import UserError
from lungopacity.evaluation.bootstrap import Resampling
from lungopacity.evaluation.card import model_card
from lungopacity.evaluation.measure import ScoredImages, measure_with_gaps
from lungopacity.evaluation.operating_points import deciding_point
from lungopacity.evaluation.report import (
    EVALUATION,
    EXPLANATION,
    EvaluationResult,
    ModelScores,
    check_output,
    write_figures,
    write_tables,
)
from lungopacity.evaluation.subgroups import check_columns, column_groups
from lungopacity.evaluation.table import fact_groups
from lungopacity.models import (
    ModelSpec,
    OperatingPoint,
    TrainedModel,
    films_known_to,
    films_of_site_point,
    load_model,
    points_of_sites,
    read_history,
    with_operating_point,
)
from lungopacity.models.probabilities import softmax
from lungopacity.progress import Progress
from lungopacity.radiograph import OUT_OF_DISTRIBUTION
from lungopacity.results.schema import check_class_columns
from lungopacity.runtime import (
    check_same_code,
    code_digest,
    cpus_here,
    free_resources,
    leave_no_core,
    ray_session,
    require_resources,
    resolve_gpu,
)
from lungopacity.storage import open_store

log = logging.getLogger(__name__)

_BATCH = 64
"""Films per forward pass; progress is shown after each."""


def evaluate(
    model: str,
    images: Sequence[str],
    labels: str,
    output: str,
    *,
    split: str = "test",
    accept: Sequence[str] = (),
    by: Sequence[str] = (),
    operating_point: str | None = None,
    reject_quality: Sequence[str] | None = None,
    use_gpu: bool | None = None,
) -> EvaluationResult:
    """Score the labelled images of one split and write metrics, scores and figures to `output`,
    replacing an older report there.

    `split`: train, validation, test or all. If the labels have no splits, those that training made
    of the same labels are used. `by`: columns of the labels to form subgroups by, besides view,
    sex, age and `site`: see `subgroups`. `operating_point`: name of the operating point for the
    decisions; all points of the model and of sites are measured. `accept`, `reject_quality`: as in
    screening; rejected films are left out. Raises `UserError`, also if the model was trained,
    selected or calibrated on a film of the test split, by its bytes.
    """
    check_columns(by)
    own = load_model(model)
    rules = settings_of_model(model, own, accept, reject_quality)
    trained = with_operating_point(model, own, operating_point)
    spec = trained.spec
    of_sites = points_of_sites(model, own)
    points = {**(spec.operating_points or {"default": own.spec.operating_point}), **of_sites}
    check_class_columns(spec.class_names)
    chosen, further = _chosen_films(labels, spec, split, by)
    check_output(output, EXPLANATION)
    with ray_session():
        data = load_pixels(images, chosen, spec.class_names, rules, labels)
        check_contents(data.images, labels)
        known = films_known_to(model)
        _check_unseen(data.images, known, split, labels)
        scores = _scores(trained, data.pixels_NHW, resolve_gpu(use_gpu))
    _check_sound(scores, data.images)
    if OUT_OF_DISTRIBUTION in rules.reject_quality:
        data, scores = _without_unlike(data, scores, labels)
    scored = _scored_images(data, scores, spec, points)
    digests = data.images["content_sha256"]
    among = {name: digests.isin(list(films_of_site_point(model, name))).sum() for name in of_sites}
    resampling = Resampling.of(data.images["patient_id"].tolist())
    decided_at = operating_point or deciding_point(points, spec.operating_point)
    metrics, gaps = measure_with_gaps(scored, _groups(data, further), resampling, decided_at)
    result = EvaluationResult(
        model_id=trained.model_id,
        output=output,
        split=split,
        images=len(data.labels_N),
        unreadable=len(data.unreadable),
        rejected=len(data.rejected),
        patients=resampling.patients,
        unknown_patients=int(data.images["patient_id"].isna().sum()),
        intervals=resampling.described(proportions=True),
        synthetic=data.synthetic or spec.synthetic,
        class_names=spec.class_names,
        positive_class=spec.positive_class,
        operating_point=operating_point,
        decided_at=decided_at,
        metrics=metrics,
        gaps=gaps,
        known_to_model=int(digests.isin(list(known)).sum()),
        picked_on={name: int(count) for name, count in among.items() if count},
    )
    store = open_store(output)
    store.delete(EVALUATION)
    write_tables(store, result, data, resampling, scores, spec.operating_point)
    with_sites = replace(spec, operating_points={**spec.operating_points, **of_sites})
    store.write("model_card.md", _card(with_sites, result, data, scores).encode())
    write_figures(store, result, scored, resampling, read_history(model))
    store.write(EVALUATION, result.to_json().encode())
    return result


def _chosen_films(
    labels: str, spec: ModelSpec, split: str, by: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of the labels to evaluate, and the subgroups by further columns, as `column_groups`
    returns them."""
    chosen = labels_of_split(labels, spec, split, by)
    further = column_groups(chosen, by, labels)
    # Columns for subgroups are dropped, because they could clash with columns that reading adds.
    return chosen.drop(columns=[name for name in further if name != "split"]), further


def _without_unlike(
    data: LabelledPixels, scores: ModelScores, labels: str
) -> tuple[LabelledPixels, ModelScores]:
    """Leave out the films that are unlike the training films. Raises `UserError` if none is
    left."""
    assert scores.unlike_N is not None  # `settings_of_model` refuses such models
    like = np.flatnonzero(~(scores.unlike_N > 1))
    if not len(like):
        raise UserError(f"{labels}: every film is {OUT_OF_DISTRIBUTION}; see --reject-quality")
    return data.without_unlike(like), scores.rows(like)


def _scored_images(
    data: LabelledPixels,
    scores: ModelScores,
    spec: ModelSpec,
    points: Mapping[str, OperatingPoint],
) -> ScoredImages:
    return ScoredImages(
        data.labels_N,
        scores.probabilities_NK.astype(np.float64),
        spec.class_names,
        spec.positive_class,
        softmax(scores.logits_NK),
        points,
        data.views("header_view"),
    )


def _card(
    spec: ModelSpec, result: EvaluationResult, data: LabelledPixels, scores: ModelScores
) -> str:
    return model_card(
        spec,
        result.model_id,
        result.metrics,
        split=result.split,
        flags_unlike=scores.unlike_N is not None,
        unreadable=result.unreadable,
        rejected=Counter(data.rejected["error_code"]),
        unknown_patients=result.unknown_patients,
        intervals=result.intervals,
        gaps=result.gaps,
        known_to_model=result.known_to_model,
        picked_on=result.picked_on,
    )


def labels_of_split(
    labels: str, spec: ModelSpec, split: str, by: Sequence[str] | None = None
) -> pd.DataFrame:
    """The rows of a labels file with the model's classes, of one split or of `all`.

    by: further columns, see `read_labels`. Raises `UserError` if there are no rows, or if a patient
    is in two splits.
    """
    frame = select_classes(read_labels(labels, by), spec.class_of_label, labels, learning=False)
    # If labels have no validation split, training took validation films from train, never from
    # test: a test split in the labels is used as it is.
    given = frame["split"].notna().all() and split == "test"
    if split != "all" and not given:
        frame = assign_splits(frame, labels, spec.split_seed)
    check_patients(frame, labels)
    chosen = frame if split == "all" else frame[frame["split"] == split].reset_index(drop=True)
    if chosen.empty:
        raise UserError(
            f"{labels}: no images in split '{split}'; give --split all or another split"
        )
    return chosen


def _check_unseen(images: pd.DataFrame, known: frozenset[str], split: str, labels: str) -> None:
    """Raises `UserError` if the model was trained, selected or calibrated on films of the test
    split. Then these are copies of other films, or the splits have changed since training, which
    nothing else would reveal."""
    seen = images.loc[images["content_sha256"].isin(list(known)), "image"]
    if split == "test" and len(seen):
        raise UserError(
            f"{labels}: the model was trained, selected or calibrated on {len(seen)} of "
            f"{len(images)} films of the test split, such as {seen.iloc[0]}; give the labels that "
            "it was trained with, or a split column, and remove copies (`lungopacity audit` finds "
            "them)"
        )
    if split == "all" and len(seen):
        log.warning(
            "the model was trained, selected or calibrated on %d of %d films: on these it looks "
            "too good",
            len(seen),
            len(images),
        )


def _check_sound(scores: ModelScores, images: pd.DataFrame) -> None:
    """Raises `UserError` if a score is NaN or infinite: metrics of the other films alone could look
    too good."""
    broken_N = np.asarray(~np.isfinite(scores.logits_NK).all(axis=1))
    if broken_N.any():
        raise UserError(
            f"the model's scores of {broken_N.sum()} of {len(broken_N)} films are not numbers, "
            f"such as {images['image'][broken_N].iloc[0]}: the GPU or the model is at fault; try "
            "--no-gpu, or train again"
        )


def _scores(model: TrainedModel, pixels_NHW: npt.NDArray[np.uint8], use_gpu: bool) -> ModelScores:
    """Score the films in a Ray task, because the driver of a submitted job may have no GPU."""
    import ray

    require_resources(cpus=1, gpus=1 if use_gpu else 0, what="evaluation")
    code = code_digest()

    def run(trained: TrainedModel, pixels: npt.NDArray[np.uint8]) -> Iterator[ModelScores]:
        from lungopacity.models.scorer import Scorer

        check_same_code(code)
        leave_no_core()
        scorer = Scorer(trained, use_gpu=use_gpu, threads=cpus_here())
        for start in range(0, len(pixels), _BATCH):
            scores = scorer.scores(pixels[start : start + _BATCH], _BATCH)
            yield ModelScores(
                scores.logits_NK,
                scorer.probabilities(scores.logits_NK),
                scores.disagreement_N,
                scorer.out_of_distribution(scores.features_NF),
            )

    task = ray.remote(run).options(num_cpus=1, num_gpus=1 if use_gpu else 0, max_retries=2)
    parts: list[ModelScores] = []
    with Progress("Scoring", total=len(pixels_NHW), waits_for=free_resources) as progress:
        for part in task.remote(model, pixels_NHW):
            parts.append(ray.get(part))
            progress.advance(len(parts[-1].logits_NK))
    return ModelScores.joined(parts)


def _groups(data: LabelledPixels, further: pd.DataFrame) -> dict[str, list[str | None]]:
    """The subgroup of each image, by column: those of every report, and those of `further`."""
    asked, groups = further.loc[data.images["image"]], fact_groups(data.images)
    # A labels column may be named like one of ours, such as `age`, with other values.
    return groups | {
        f"{name} of the labels" if name in groups else str(name): asked[name].tolist()
        for name in asked
    }
