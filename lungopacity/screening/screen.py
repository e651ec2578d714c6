"""Screen an archive: inventory ▶ plan ▶ pipeline ▶ publish. The whole journey reads here."""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lungopacity import observe
from lungopacity.archive.content import ReadSettings, rules_from
from lungopacity.archive.inventory import Inventory, list_archive
from lungopacity.archive.inventory_report import read_inventory
from lungopacity.dataset.manifest import read_labels
from lungopacity.errors import NOTICE, Status, UserError
from lungopacity.evaluation.drift import Sample, Shift, drift_metrics, shifts
from lungopacity.evaluation.metrics import Metric
from lungopacity.evaluation.table import metric_value, metrics_table
from lungopacity.models import TrainedModel, load_model, with_operating_point
from lungopacity.progress import Progress
from lungopacity.results.folder import METRICS, commit_run, read_run
from lungopacity.results.query import predictions_of
from lungopacity.results.schema import class_column
from lungopacity.results.workbench import parquet_bytes, workbench
from lungopacity.runtime import (
    done_with_ray,
    end_if_told,
    ray_ahead,
    ray_session,
    resolve_gpu,
    versions,
)
from lungopacity.screening.aggregate import label_metrics, run_metrics
from lungopacity.screening.explanations import Explainer
from lungopacity.screening.history import History
from lungopacity.screening.pipeline import OBJECTS, ScoringResources, screen_objects
from lungopacity.screening.plan import Plan, make_plan, new_run_id
from lungopacity.screening.pseudonyms import Pseudonyms, read_pseudonyms
from lungopacity.screening.publish import collect, remove_work
from lungopacity.storage import Store, open_store

log = logging.getLogger(__name__)

MAX_FAILED_FRACTION = 0.05
_ROUNDS = 3
"""Of the pipeline. A node that is lost can leave a shard half read, and Ray goes on elsewhere."""


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
    positive: int
    """Decided positive at the model's operating point."""
    explained: int
    """Of them, those with a picture of where the model saw it."""
    synthetic: bool
    seconds: float
    """Of this attempt, inventory to commit."""
    metrics: list[Metric]
    max_failed_fraction: float = MAX_FAILED_FRACTION
    drift: tuple[Shift, ...] = ()
    """Against the job's baseline, if it has one."""

    @property
    def broken(self) -> bool:
        """More images failed than may."""
        return self.failed > self.max_failed_fraction * self.images

    @property
    def exit_code(self) -> int:
        """0: every image was read. 1: some could not be. 2: too many could not be."""
        return 2 if self.broken else 1 if self.failed else 0


@dataclass(frozen=True)
class ScreeningJob:
    """What to score, with what and by which rules; checked."""

    model_uri: str
    model: TrainedModel
    results: Store
    read_settings: ReadSettings
    pseudonyms: Pseudonyms | None
    labels: pd.DataFrame | None
    batch_size: int
    max_failed_fraction: float
    use_gpu: bool | None
    gpus_per_actor: float = 1.0
    model_actors: int | None = None
    operating_point: str | None = None
    """Its name, where it is not the model's own choice."""
    baseline: Sample | None = None
    """Of the run that scores and mixes are compared with."""
    explain: bool = False
    """Write a picture of each positive film, see `Explainer`."""
    noted: Mapping[str, Any] = field(default_factory=dict)
    """More for the commit record."""

    @property
    def rules(self) -> dict[str, Any]:
        """What two attempts at one run must agree in."""
        names = self.pseudonyms
        return {
            "accept": sorted(code.value for code in self.read_settings.accept),
            "reject_quality": sorted(self.read_settings.reject_quality),
            "hmac_key_fingerprint": None if names is None else names.fingerprint,
            "key_map": None if names is None else names.key_map,
            "operating_point": self.operating_point,
            "threshold": self.model.spec.operating_point.threshold,
            "review_from": self.model.spec.operating_point.review_from,
            "explain": self.explain,
        }


def screen(
    archive: str,
    model: str,
    output: str,
    *,
    inventory: str | None = None,
    run_id: str | None = None,
    limit: int | None = None,
    **options: Any,
) -> ScreeningResult:
    """Score every image of an archive and publish one run to a results folder.

    archive, model, output: URIs. `inventory`: URI of a list that stands in for listing the archive,
    see `read_inventory`. `run_id`: give the id of a killed run to go on with it. `limit`:
    only the first so many objects by key. options: those of `screening_job`. Raises `UserError`;
    unreadable images raise nothing, they are rows.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")
    began = time.monotonic()
    job = screening_job(model, output, **options)
    # Not so in `nightly`: a night may find nothing to do, and then it needs no Ray.
    with ray_ahead():
        listed = inventory_at(archive, inventory)
        return run_job(job, listed, began, run_id=run_id, limit=limit)


def screening_job(
    model: str,
    output: str,
    *,
    accept: Sequence[str] = (),
    reject_quality: Sequence[str] | None = None,
    max_failed_fraction: float = MAX_FAILED_FRACTION,
    hmac_key: str | None = None,
    hash_keys: bool = False,
    key_map: str | None = None,
    labels: str | None = None,
    batch_size: int = 64,
    use_gpu: bool | None = None,
    gpus_per_actor: float = 1.0,
    model_actors: int | None = None,
    baseline: str | None = None,
    operating_point: str | None = None,
    explain: bool = False,
    noted: Mapping[str, Any] | None = None,
) -> ScreeningJob:
    """Read and check what a run needs, before anything is listed.

    `accept`: of wrong_modality, wrong_body_part and lateral_view, what to score all the same.
    `reject_quality`: quality flags that reject a film; None is the default, () is none.
    `max_failed_fraction`: of images that cannot be read, above which the run is called broken.
    `hmac_key`: URI of a file with the key for `patient_hmac` and `study_hmac`. `hash_keys`: names
    of objects are hashed, too; `key_map`: folder that keeps the names (default: beside `output`).
    `operating_point`: name of one that the model folder has; None is its own choice. `explain`:
    a picture of each positive film is written below `explanations/`.
    `labels`: a labels file, for metrics. `baseline`: id of a published run of the same model, to
    measure drift against. `use_gpu`: None uses what the cluster has. `gpus_per_actor`,
    `model_actors`: see `ScoringResources.of_cluster`. Raises `UserError`.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {batch_size}")
    if not 0 <= max_failed_fraction <= 1:
        raise UserError(f"--max-failed-fraction must be from 0 to 1, not {max_failed_fraction}")
    if hash_keys and hmac_key is None:
        raise UserError("--hash-keys needs --hmac-key FILE")
    if key_map is not None and not hash_keys:
        raise UserError("--key-map is for --hash-keys; give both or none")
    accepted, rejecting = rules_from(accept, reject_quality)
    trained = with_operating_point(model, load_model(model), operating_point)
    results = open_store(output)
    pseudonyms = None
    if hmac_key is not None:
        # Not inside the results folder: whoever may query it is not to see the names.
        kept = (key_map or f"{results.uri}-key-map") if hash_keys else None
        pseudonyms = read_pseudonyms(hmac_key, kept)
    return ScreeningJob(
        model_uri=model,
        model=trained,
        results=results,
        read_settings=ReadSettings(
            trained.spec.preprocessing,
            accept=accepted,
            reject_quality=rejecting,
            hmac_key=None if pseudonyms is None else pseudonyms.key,
        ),
        pseudonyms=pseudonyms,
        labels=None if labels is None else read_labels(labels),
        batch_size=batch_size,
        max_failed_fraction=max_failed_fraction,
        use_gpu=use_gpu,
        gpus_per_actor=gpus_per_actor,
        model_actors=model_actors,
        operating_point=operating_point,
        explain=explain,
        baseline=None if baseline is None else _baseline(results, baseline, trained),
        noted={**(noted or {}), **({} if baseline is None else {"baseline": baseline})},
    )


def _baseline(results: Store, run_id: str, model: TrainedModel) -> Sample:
    """What drift is measured against. Raises `UserError` where the model has no such run."""
    record = read_run(results, run_id)
    if record is None:
        raise UserError(
            f"--baseline: {results.uri} has no published run '{run_id}'; see `lungopacity runs`"
        )
    if record["model_id"] != model.model_id:
        raise UserError(
            f"--baseline: run '{run_id}' is of model {record['model_id']}, not "
            f"{model.model_id}: scores of two models cannot be compared; choose another run"
        )
    with workbench() as (connection, _):
        connection.register("baseline", predictions_of(results, [record]))
        return Sample.of(connection.table("baseline"), class_column("p", model.spec.positive_class))


def inventory_at(archive: str, inventory: str | None = None) -> Inventory:
    """List the archive, or read the list that is given for it; with progress."""
    progress = Progress("Listing the archive", unit="objects")
    found = (
        list_archive(archive, progress.advance)
        if inventory is None
        else read_inventory(inventory, archive, progress.advance)
    )
    return Inventory(found.uri, progress.around(found.tables))


def run_job(
    job: ScreeningJob,
    inventory: Inventory,
    began: float,
    *,
    run_id: str | None = None,
    limit: int | None = None,
    history: History | None = None,
    before_commit: Callable[[], None] | None = None,
    nightly: bool = False,
) -> ScreeningResult:
    """Plan, screen and publish one run over the objects of the inventory.

    `began`: `time.monotonic()` at the start. `run_id`, `limit`: see `screen`. `history`: what needs
    no screening. `before_commit` may raise, and then nothing is published. `nightly`: see
    `make_plan`. Raises `UserError`.
    """
    model_id = job.model.model_id
    run_id = run_id or new_run_id(model_id)
    observe.set_run(run_id)
    with TemporaryDirectory(prefix="lungopacity-") as name:
        folder = Path(name)
        plan = make_plan(
            job.results,
            inventory,
            model_id,
            run_id,
            folder,
            limit=limit,
            rules=job.rules,
            history=history,
            nightly=nightly,
        )
        log.info(
            "run %s: %d objects of %s, model %s%s",
            run_id,
            plan.start.objects,
            plan.start.archive,
            model_id,
            " (taken up again)" if plan.resumed else "",
        )
        try:
            _screen_what_is_missing(job, plan, folder)
        except KeyboardInterrupt:
            log.warning("stopped; go on with --run-id %s and the same options", run_id)
            raise
        done_with_ray()
        result = _published(job, plan, began, before_commit)
    remove_work(job.results, plan)
    return result


def _screen_what_is_missing(job: ScreeningJob, plan: Plan, folder: Path) -> None:
    """Until every object of the plan has its rows in part files. `folder`: for lists of the rest.

    A million objects at a time: the driver's memory does not grow with the archive.
    """
    class_names = job.model.spec.class_names
    todo = list(plan.files)
    if plan.resumed:
        with collect(job.results, plan, class_names) as collected:
            todo = collected.missing(folder, "resumed")
        log.info("%d of %d objects are still to do", _rows(todo), plan.start.objects)
    for number in range(_ROUNDS):
        if not todo:
            return
        if number:
            log.warning("%d objects were lost on the way and are read again", _rows(todo))
        for path in todo:
            with _surviving_lost_nodes():
                _run_pipeline(job, plan, pq.read_table(path))
        with collect(job.results, plan, class_names) as collected:
            todo = collected.missing(folder, f"round-{number}")
    if todo:
        raise UserError(
            f"{_rows(todo)} of {plan.start.objects} objects have no result after {_ROUNDS} "
            f"rounds; nothing was published. Go on with --run-id {plan.start.run_id}"
        )


@contextmanager
def _surviving_lost_nodes() -> Iterator[None]:
    """A node that goes takes actors with it, and Ray Data may give up then; the next round reads
    what is missing. What a task of ours raises is no such thing."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayTaskError:
        raise
    except RayError as error:
        log.warning("Ray lost what it was working on (%s)", type(error).__name__)


def _rows(files: Sequence[Path]) -> int:
    return sum(pq.read_metadata(path).num_rows for path in files)


def _run_pipeline(job: ScreeningJob, plan: Plan, todo: pa.Table) -> None:
    shards = pa.compute.sum(todo["is_shard"]).as_py() or 0
    objects = 0
    with ray_session():
        resources = ScoringResources.of_cluster(
            resolve_gpu(job.use_gpu), job.gpus_per_actor, job.model_actors
        )
        counts: Counter[str] = Counter()
        # How many images a shard holds is known only once it has been read.
        with Progress("Screening", total=None if shards else todo.num_rows) as progress:
            for part in screen_objects(
                plan.start.archive,
                todo,
                job.model,
                job.read_settings,
                job.results,
                plan.work,
                resources,
                job.batch_size,
                Explainer(plan.start.run_id) if job.explain else None,
            ):
                end_if_told()
                counts += part
                objects += counts.pop(OBJECTS, 0)
                # All each time: Ray tells a gauge to Prometheus once after it was set.
                observe.gauge("objects_planned", plan.start.objects)
                observe.gauge("objects_waiting", todo.num_rows - objects)
                observe.gauge("images_done", counts.total())
                of = f", {objects} of {todo.num_rows} objects" if shards else ""
                progress.advance(
                    counts.total() - progress.done, note=f"{counts[Status.FAILED]} failed{of}"
                )


def _published(
    job: ScreeningJob, plan: Plan, began: float, before_commit: Callable[[], None] | None
) -> ScreeningResult:
    spec, start = job.model.spec, plan.start
    with collect(job.results, plan, spec.class_names) as collected:
        collected.finish(job.labels, synthetic_model=spec.synthetic)
        files = collected.write(job.results, job.pseudonyms)
        predictions = collected.connection.table("final")
        seconds = time.monotonic() - began
        metrics = run_metrics(predictions, spec, seconds)
        if job.labels is not None:
            metrics += label_metrics(predictions, spec, job.labels)
        drift: list[Shift] = []
        if job.baseline is not None:
            tonight = Sample.of(predictions, class_column("p", spec.positive_class))
            drift = shifts(job.baseline, tonight)
            metrics += drift_metrics(drift, job.baseline, tonight)
        ((synthetic, labelled, positive, explained),) = predictions.query(
            "predictions",
            "SELECT coalesce(bool_or(synthetic), false), count(label), "
            "count(*) FILTER (decision = 'positive'), count(explanation) FROM predictions",
        ).fetchall()
    synthetic = synthetic or spec.synthetic
    counts = {status: int(metric_value(metrics, f"images_{status}") or 0) for status in Status}
    result = ScreeningResult(
        run_id=start.run_id,
        model_id=start.model_id,
        results=job.results.uri,
        images=sum(counts.values()),
        ok=counts[Status.OK],
        rejected=counts[Status.REJECTED],
        failed=counts[Status.FAILED],
        positive=positive,
        explained=explained,
        synthetic=synthetic,
        seconds=seconds,
        metrics=metrics,
        max_failed_fraction=job.max_failed_fraction,
        drift=tuple(drift),
    )
    metrics_key = f"{METRICS}/{start.run_id}-{uuid.uuid4().hex[:8]}.parquet"
    job.results.write(
        metrics_key,
        parquet_bytes(metrics_table(metrics, start.run_id, start.model_id, synthetic=synthetic)),
    )
    if before_commit is not None:
        before_commit()
    commit_run(
        job.results,
        start.run_id,
        {
            **_record(job, plan, result),
            "labelled": labelled,
            "files": files,
            "metrics_file": {"key": metrics_key, "rows": len(metrics)},
        },
    )
    return result


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
        "positive": result.positive,
        "explained": result.explained,
        "broken": result.broken,
        "settings": {
            **job.rules,
            "batch_size": job.batch_size,
            "max_failed_fraction": job.max_failed_fraction,
        },
        "seconds": round(result.seconds, 3),
        "images_per_s": round(result.images / result.seconds, 3),
        "versions": versions(),
        **job.noted,
    }
