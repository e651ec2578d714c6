"""Screen an archive: inventory ▶ plan ▶ pipeline ▶ publish. The whole journey reads here."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pandas as pd
import pyarrow as pa

from lungopacity.archive.content import ReadSettings, rules_from
from lungopacity.archive.inventory import Archive, take_inventory
from lungopacity.dataset.manifest import read_labels
from lungopacity.errors import NOTICE, Status, UserError
from lungopacity.evaluation.metrics import Metric
from lungopacity.evaluation.table import metrics_table
from lungopacity.models import TrainedModel, load_model
from lungopacity.progress import Progress
from lungopacity.results.folder import commit_run
from lungopacity.runtime import ray_session, resolve_gpu, versions
from lungopacity.screening.aggregate import label_metrics, run_metrics
from lungopacity.screening.pipeline import ScoringResources, screen_objects
from lungopacity.screening.plan import Plan, make_plan, new_run_id, parquet_bytes
from lungopacity.screening.pseudonyms import Pseudonyms, read_pseudonyms
from lungopacity.screening.publish import (
    collect,
    missing_objects,
    remove_work,
    write_predictions,
)
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
    synthetic: bool
    seconds: float
    """Of this attempt, inventory to commit."""
    metrics: list[Metric]
    max_failed_fraction: float = MAX_FAILED_FRACTION

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
        }


def screen(
    archive: str,
    model: str,
    output: str,
    *,
    run_id: str | None = None,
    limit: int | None = None,
    **options: Any,
) -> ScreeningResult:
    """Score every image of an archive and publish one run to a results folder.

    archive, model, output: URIs. `run_id`: give the id of a killed run to go on with it. `limit`:
    only the first so many objects by key. options: those of `screening_job`. Raises `UserError`;
    unreadable images raise nothing, they are rows.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")
    began = time.monotonic()
    job = screening_job(model, output, **options)
    with Progress("Listing the archive", unit="objects") as progress:
        inventory = take_inventory(archive, progress.advance)
    return run_job(job, inventory, began, run_id=run_id, limit=limit)


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
    noted: Mapping[str, Any] | None = None,
) -> ScreeningJob:
    """Read and check what a run needs, before anything is listed.

    `accept`: of wrong_modality, wrong_body_part and lateral_view, what to score all the same.
    `reject_quality`: quality flags that reject a film; None is the default, () is none.
    `max_failed_fraction`: of images that cannot be read, above which the run is called broken.
    `hmac_key`: URI of a file with the key for `patient_hmac` and `study_hmac`. `hash_keys`: names
    of objects are hashed, too; `key_map`: folder that keeps the names (default: beside `output`).
    `labels`: a labels file, for metrics. `use_gpu`: None uses what the cluster has. Raises
    `UserError`.
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
    trained = load_model(model)
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
        noted=noted or {},
    )


def run_job(
    job: ScreeningJob,
    archive: Archive,
    began: float,
    *,
    run_id: str | None = None,
    limit: int | None = None,
) -> ScreeningResult:
    """Plan, screen and publish one run over the objects of `archive`.

    `began`: `time.monotonic()` at the start. `run_id`, `limit`: see `screen`. Raises `UserError`.
    """
    model_id = job.model.model_id
    run_id = run_id or new_run_id(model_id)
    plan = make_plan(job.results, archive, model_id, run_id, limit, job.rules)
    log.info(
        "run %s: %d objects of %s, model %s%s",
        run_id,
        plan.objects.num_rows,
        plan.start.archive,
        model_id,
        " (taken up again)" if plan.resumed else "",
    )
    try:
        rows = _screened_rows(job, plan)
    except KeyboardInterrupt:
        log.warning("stopped; go on with --run-id %s and the same options", run_id)
        raise
    return _published(job, plan, rows, time.monotonic() - began)


def _screened_rows(job: ScreeningJob, plan: Plan) -> pa.Table:
    """Screen what earlier attempts have not finished; every image's row, once."""
    class_names = job.model.spec.class_names
    todo = plan.objects
    if plan.resumed:
        todo = missing_objects(plan, collect(job.results, plan, class_names))
        log.info("%d of %d objects are still to do", todo.num_rows, plan.objects.num_rows)
    for number in range(_ROUNDS):
        if todo.num_rows:
            if number:
                log.warning("%d objects were lost on the way and are read again", todo.num_rows)
            _run_pipeline(job, plan, todo)
        finished = collect(job.results, plan, class_names)
        todo = missing_objects(plan, finished)
        if not todo.num_rows:
            return finished.rows
    raise UserError(
        f"{todo.num_rows} of {plan.objects.num_rows} objects have no result after {_ROUNDS} "
        f"rounds; nothing was published. Go on with --run-id {plan.start.run_id}"
    )


def _run_pipeline(job: ScreeningJob, plan: Plan, todo: pa.Table) -> None:
    shards = pa.compute.sum(todo["is_shard"]).as_py() or 0
    with ray_session():
        resources = ScoringResources.of_cluster(resolve_gpu(job.use_gpu))
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
            ):
                counts += part
                progress.advance(part.total(), note=f"{counts[Status.FAILED]} failed")


def _published(job: ScreeningJob, plan: Plan, rows: pa.Table, seconds: float) -> ScreeningResult:
    spec, start, labels = job.model.spec, plan.start, job.labels
    label_of = {} if labels is None else dict(zip(labels["image"], labels["label"], strict=True))
    table, files = write_predictions(
        job.results,
        plan,
        rows,
        spec.class_names,
        synthetic_model=spec.synthetic,
        label_of=label_of,
        pseudonyms=job.pseudonyms,
    )
    synthetic = spec.synthetic or bool(pa.compute.any(table["synthetic"]).as_py())
    metrics = run_metrics(table, spec, seconds)
    if labels is not None:
        metrics += label_metrics(_with_names(table, rows), spec, labels)
    metrics_key = f"metrics/{start.run_id}.parquet"
    job.results.write(
        metrics_key,
        parquet_bytes(metrics_table(metrics, start.run_id, start.model_id, synthetic=synthetic)),
    )
    counts = Counter(table["status"].to_pylist())
    result = ScreeningResult(
        run_id=start.run_id,
        model_id=start.model_id,
        results=job.results.uri,
        images=table.num_rows,
        ok=counts[Status.OK],
        rejected=counts[Status.REJECTED],
        failed=counts[Status.FAILED],
        positive=Counter(table["decision"].to_pylist())["positive"],
        synthetic=synthetic,
        seconds=seconds,
        metrics=metrics,
        max_failed_fraction=job.max_failed_fraction,
    )
    commit_run(
        job.results,
        start.run_id,
        {
            **_record(job, plan, result),
            "labelled": len(table) - table["label"].null_count,
            "files": files,
            "metrics_file": {"key": metrics_key, "rows": len(metrics)},
        },
    )
    remove_work(job.results, plan)
    return result


def _with_names(table: pa.Table, rows: pa.Table) -> pa.Table:
    """The published table with the objects' own names, by which labels know them."""
    for name in ("image", "member"):
        table = table.set_column(table.schema.get_field_index(name), name, rows[name])
    return table


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
        "objects": plan.objects.num_rows,
        "images": result.images,
        "counts": {status.value: getattr(result, status.value) for status in Status},
        "positive": result.positive,
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
