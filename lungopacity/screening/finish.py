"""The last step of a run: publish its rows, metrics and drift."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from lungopacity.errors import NOTICE, Status
from lungopacity.evaluation.drift import Sample, Shift, drift_metrics, shifts
from lungopacity.evaluation.metrics import Metric
from lungopacity.evaluation.table import metric_value, metrics_table
from lungopacity.results.folder import commit_run, metrics_key
from lungopacity.results.schema import class_column
from lungopacity.results.workbench import quoted
from lungopacity.runtime import versions
from lungopacity.screening.aggregate import label_metrics, run_metrics, warn_of_useless_labels
from lungopacity.screening.job import MAX_FAILED_FRACTION, ScreeningJob
from lungopacity.screening.plan import Plan
from lungopacity.screening.publish import Collected, collect
from lungopacity.storage.parquet import parquet_bytes

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScreeningResult:
    """A published run."""

    run_id: str
    model_id: str
    results: str
    """URI of the results folder."""
    images: int
    ok: int
    rejected: int
    failed: int
    repeated: int
    """Images of objects that an earlier run tried with the same content."""
    failed_again: int
    """Those of the repeated images that could not be read this time either."""
    positive: int
    """Images decided positive at the operating point."""
    review: int
    """Images decided neither positive nor negative: a person should look at them."""
    explained: int
    """Positive images with a picture of where the model sees the positive class."""
    synthetic: bool
    seconds: float
    """Time of this attempt, from the inventory until the rows are written."""
    metrics: list[Metric]
    max_failed_fraction: float = MAX_FAILED_FRACTION
    drift: tuple[Shift, ...] = ()
    """Against the job's baseline, if it has one."""
    labelled: int | None = None
    """Images that the job's labels name; None if the job has no labels."""
    unmatched_labels: int = 0
    """Rows of the labels that name no image of the run, or no single one."""
    of_classes: int = 0
    """Labelled images whose label stands for one of the model's classes."""
    operating_point: str | None = None
    """The name of the operating point; None is the model's own choice."""
    known_to_model: int = 0
    """Labelled, scored images that the model was trained, selected or calibrated on. Metrics
    against the labels leave them out."""
    picked_on: int = 0
    """Films in the metrics against the labels that the operating point was picked on."""

    @property
    def images_per_s(self) -> float | None:
        """None for a resumed run, because earlier attempts screened part of its images."""
        return metric_value(self.metrics, "images_per_s")

    @property
    def broken(self) -> bool:
        """Whether more images failed than `max_failed_fraction` allows. Images that were tried
        before do not count: an unreadable object would make every quiet night broken."""
        failed, images = self.failed - self.failed_again, self.images - self.repeated
        return failed > self.max_failed_fraction * images

    @property
    def nothing_scored(self) -> bool:
        """Whether there were images and none got a score: a device may have begun to tag or invert
        all its films. Images that fail again do not count, or every quiet night would raise this.
        """
        return self.images > self.failed_again and self.ok == 0

    @property
    def exit_code(self) -> int:
        """0: every image was read. 1: some could not be read, or none was scored. 2: too many could
        not be read."""
        return 2 if self.broken else 1 if self.failed or self.nothing_scored else 0


def publish_run(
    job: ScreeningJob, plan: Plan, began: float, before_commit: Callable[[], None]
) -> ScreeningResult:
    """Write predictions, metrics and the commit record. Writing the record publishes the run.

    `began`, `before_commit`: see `run_job`.
    """
    start = plan.start
    log.info("run %s: collecting its rows and publishing them", start.run_id)
    with collect(job.results, plan, job.model.spec.class_names) as collected:
        collected.finish(synthetic_model=job.model.spec.synthetic)
        labels = _labelled(collected, job)
        files = collected.write(job.results, job.pseudonyms)
        result = _result(job, plan, collected, labels, time.monotonic() - began)
    if result.known_to_model:
        log.warning(
            "the model was trained, selected or calibrated on %d of the labelled films: metrics "
            "against the labels leave them out",
            result.known_to_model,
        )
    if result.picked_on:
        log.warning(
            "operating point %s was picked on %d of the films in the metrics against the labels: "
            "those that depend on its decisions are too good",
            result.operating_point,
            result.picked_on,
        )
    table = metrics_table(result.metrics, start.run_id, start.model_id, synthetic=result.synthetic)
    key = metrics_key(start.run_id, uuid.uuid4().hex[:8])
    job.results.write(key, parquet_bytes(table))
    named = {"files": files, "metrics_file": {"key": key, "rows": table.num_rows}}
    record = {**_record(job, plan, result), **named}
    commit_run(job.results, start.run_id, record, before_commit)
    return result


def _result(
    job: ScreeningJob,
    plan: Plan,
    collected: Collected,
    labels: pd.DataFrame | None,
    seconds: float,
) -> ScreeningResult:
    """Count and measure the collected rows. `labels`: as `_labelled` returns them."""
    spec, start = job.model.spec, plan.start
    predictions = collected.connection.table("final")
    metrics = run_metrics(predictions, spec, seconds, resumed=plan.resumed)
    unmatched_labels = 0
    if job.labels is not None and labels is not None:
        unmatched_labels = len(job.labels) - len(labels)
        metrics += label_metrics(predictions, spec, labels, job.known_films, job.point_films)
        warn_of_useless_labels(
            predictions, spec, job.labels, may_quote_names=not job.rules.hash_keys
        )
    ((repeated, failed_again),) = collected.connection.execute(
        "SELECT count(*), count(*) FILTER (status = 'failed') FROM final "
        "SEMI JOIN (SELECT image FROM plan WHERE repeated) USING (image)"
    ).fetchall()
    drift: list[Shift] = []
    if job.baseline is not None:
        tonight = Sample.of(predictions, class_column("p", spec.positive_class), failed_again)
        drift = shifts(job.baseline, tonight)
        metrics += drift_metrics(drift, job.baseline, tonight)
    known = ", ".join(map(quoted, spec.class_of_label))
    ((synthetic, labelled, of_classes, positive, review, explained),) = predictions.query(
        "predictions",
        "SELECT coalesce(bool_or(synthetic), false), count(label), "
        f"count(*) FILTER (label IN ({known})), "
        "count(*) FILTER (decision = 'positive'), count(*) FILTER (decision = 'review'), "
        "count(explanation) FROM predictions",
    ).fetchall()
    counts = {status: int(metric_value(metrics, f"images_{status}") or 0) for status in Status}
    return ScreeningResult(
        run_id=start.run_id,
        model_id=start.model_id,
        results=job.results.uri,
        images=sum(counts.values()),
        ok=counts[Status.OK],
        rejected=counts[Status.REJECTED],
        failed=counts[Status.FAILED],
        repeated=repeated,
        failed_again=failed_again,
        positive=positive,
        review=review,
        explained=explained,
        synthetic=synthetic or spec.synthetic,
        seconds=seconds,
        metrics=metrics,
        max_failed_fraction=job.max_failed_fraction,
        drift=tuple(drift),
        labelled=None if job.labels is None else labelled,
        unmatched_labels=unmatched_labels,
        of_classes=of_classes,
        operating_point=job.operating_point,
        known_to_model=int(metric_value(metrics, "films_known_to_model") or 0),
        picked_on=int(metric_value(metrics, "films_operating_point_picked_on") or 0),
    )


def _labelled(collected: Collected, job: ScreeningJob) -> pd.DataFrame | None:
    """Write the labels to the collected rows. Returns the labels that match an image, with `image`
    named as in the archive."""
    if job.labels is None:
        return None
    labels, doubts = collected.label(job.labels)
    if doubts:
        example = "" if job.rules.hash_keys else f" (such as: {doubts[0]})"
        log.warning(
            "%d matches between labels and images are ambiguous%s: these images get no label",
            len(doubts),
            example,
        )
    return labels


def _record(job: ScreeningJob, plan: Plan, result: ScreeningResult) -> dict[str, Any]:
    spec, start = job.model.spec, plan.start
    return {
        "notice": NOTICE,
        "run_id": start.run_id,
        "model_id": start.model_id,
        "model": job.model_uri,
        "class_names": list(spec.class_names),
        "positive_class": spec.positive_class,
        "synthetic": result.synthetic,
        "archive": start.archive,
        "started_at": start.started_at,
        "finished_at": datetime.now(UTC).isoformat(timespec="microseconds"),
        "objects": start.objects,
        "images": result.images,
        "counts": {status.value: getattr(result, status.value) for status in Status},
        "failed_again": result.failed_again,
        "positive": result.positive,
        "review": result.review,
        "explained": result.explained,
        "labelled": result.labelled or 0,
        "broken": result.broken,
        "settings": {
            **job.rules.settings(),
            "key_map": job.key_map,
            "batch_size": job.batch_size,
            "max_failed_fraction": job.max_failed_fraction,
        },
        "seconds": round(result.seconds, 3),
        "images_per_s": None if result.images_per_s is None else round(result.images_per_s, 3),
        "versions": versions(),
        **job.noted,
    }
