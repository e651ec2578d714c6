"""Screen an archive: inventory ▶ plan ▶ pipeline ▶ publish. The whole journey reads here."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pandas as pd
import pyarrow as pa

from lungopacity.archive.inventory import take_inventory
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
from lungopacity.screening.publish import (
    collect,
    missing_objects,
    remove_work,
    write_predictions,
)
from lungopacity.storage import Store, open_store

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
    positive: int
    """Decided positive at the model's operating point."""
    synthetic: bool
    seconds: float
    """Of this attempt, inventory to commit."""
    metrics: list[Metric]

    @property
    def exit_code(self) -> int:
        """0: every image was read. 1: some could not be."""
        return 1 if self.failed else 0


def screen(
    archive: str,
    model: str,
    output: str,
    *,
    run_id: str | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    labels: str | None = None,
    use_gpu: bool | None = None,
) -> ScreeningResult:
    """Score every image of an archive and publish one run to a results folder.

    archive, model, output: URIs. `run_id`: give the id of a killed run to go on with it. `limit`:
    only the first so many objects by key. `labels`: a labels file, for metrics. `use_gpu`: None
    uses what the cluster has. Raises `UserError`; unreadable images raise nothing, they are rows.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {batch_size}")
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")
    began = time.monotonic()
    trained = load_model(model)
    results = open_store(output)
    label_table = None if labels is None else read_labels(labels)
    run_id = run_id or new_run_id(trained.model_id)
    with Progress("Listing the archive", unit="objects") as progress:
        inventory = take_inventory(archive, progress.advance)
    plan = make_plan(results, inventory, trained.model_id, run_id, limit)
    log.info(
        "run %s: %d objects of %s, model %s%s",
        run_id,
        plan.objects.num_rows,
        plan.start.archive,
        trained.model_id,
        " (taken up again)" if plan.resumed else "",
    )
    try:
        rows = _screened_rows(plan, trained, results, batch_size, use_gpu)
    except KeyboardInterrupt:
        log.warning("stopped; go on with --run-id %s and the same options", run_id)
        raise
    return _published(plan, trained, results, rows, label_table, time.monotonic() - began)


def _screened_rows(
    plan: Plan, model: TrainedModel, results: Store, batch_size: int, use_gpu: bool | None
) -> pa.Table:
    """Screen what earlier attempts have not finished; every image's row, once."""
    class_names = model.spec.class_names
    todo = plan.objects
    if plan.resumed:
        todo = missing_objects(plan, collect(results, plan, class_names))
        log.info("%d of %d objects are still to do", todo.num_rows, plan.objects.num_rows)
    if todo.num_rows:
        _run_pipeline(plan, todo, model, results, batch_size, use_gpu)
    finished = collect(results, plan, class_names)
    missing = missing_objects(plan, finished)
    if missing.num_rows:
        raise UserError(
            f"{missing.num_rows} of {plan.objects.num_rows} objects have no result, as "
            f"{missing['image'][0].as_py()}; nothing was published. "
            f"Go on with --run-id {plan.start.run_id}"
        )
    return finished.rows


def _run_pipeline(
    plan: Plan,
    todo: pa.Table,
    model: TrainedModel,
    results: Store,
    batch_size: int,
    use_gpu: bool | None,
) -> None:
    shards = pa.compute.sum(todo["is_shard"]).as_py() or 0
    with ray_session():
        resources = ScoringResources.of_cluster(resolve_gpu(use_gpu))
        counts: Counter[str] = Counter()
        # How many images a shard holds is known only once it has been read.
        with Progress("Screening", total=None if shards else todo.num_rows) as progress:
            for part in screen_objects(
                plan.start.archive, todo, model, results, plan.work, resources, batch_size
            ):
                counts += part
                progress.advance(part.total(), note=f"{counts[Status.FAILED]} failed")


def _published(
    plan: Plan,
    model: TrainedModel,
    results: Store,
    rows: pa.Table,
    labels: pd.DataFrame | None,
    seconds: float,
) -> ScreeningResult:
    spec, start = model.spec, plan.start
    label_of = {} if labels is None else dict(zip(labels["image"], labels["label"], strict=True))
    table, files = write_predictions(
        results,
        plan,
        rows,
        spec.class_names,
        synthetic_model=spec.synthetic,
        label_of=label_of,
    )
    synthetic = spec.synthetic or bool(pa.compute.any(table["synthetic"]).as_py())
    metrics = run_metrics(table, spec, seconds)
    if labels is not None:
        metrics += label_metrics(table, spec, labels)
    metrics_key = f"metrics/{start.run_id}.parquet"
    results.write(
        metrics_key,
        parquet_bytes(metrics_table(metrics, start.run_id, model.model_id, synthetic=synthetic)),
    )
    counts = Counter(table["status"].to_pylist())
    positive = Counter(table["decision"].to_pylist())["positive"]
    record: dict[str, Any] = {
        "notice": NOTICE,
        "run_id": start.run_id,
        "model_id": model.model_id,
        "class_names": list(spec.class_names),
        "positive_class": spec.positive_class,
        "synthetic": synthetic,
        "archive": start.archive,
        "started_at": start.started_at,
        "finished_at": datetime.now(UTC).isoformat(timespec="microseconds"),
        "objects": plan.objects.num_rows,
        "images": table.num_rows,
        "counts": {status.value: counts[status.value] for status in Status},
        "positive": positive,
        "labelled": len(table) - table["label"].null_count,
        "files": files,
        "metrics_file": {"key": metrics_key, "rows": len(metrics)},
        "seconds": round(seconds, 3),
        "images_per_s": round(table.num_rows / seconds, 3),
        "versions": versions(),
    }
    commit_run(results, start.run_id, record)
    remove_work(results, plan)
    return ScreeningResult(
        run_id=start.run_id,
        model_id=model.model_id,
        results=results.uri,
        images=table.num_rows,
        ok=counts[Status.OK],
        rejected=counts[Status.REJECTED],
        failed=counts[Status.FAILED],
        positive=positive,
        synthetic=synthetic,
        seconds=seconds,
        metrics=metrics,
    )
