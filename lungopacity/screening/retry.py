"""Screen again what a published run could not read for a reason that may no longer apply."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lungopacity.archive.inventory import Inventory, plan_table
from lungopacity.errors import OF_STORAGE, OF_VERSION, Status, UserError
from lungopacity.models.scorer import FLOAT32
from lungopacity.results.folder import read_run
from lungopacity.results.query import files_of_runs, predictions_of
from lungopacity.results.schema import PLAN_SCHEMA
from lungopacity.results.workbench import workbench
from lungopacity.screening.finish import ScreeningResult
from lungopacity.screening.history import History, of_other_version
from lungopacity.screening.job import ScreeningJob, screening_job
from lungopacity.screening.pseudonyms import read_key_map
from lungopacity.screening.screen import run_job
from lungopacity.storage import ObjectInfo, Store, open_store
from lungopacity.words import counted

_HEAD_THREADS = 32


def retry(
    results: str,
    run_id: str,
    *,
    model: str | None = None,
    hmac_key: str | None = None,
    labels: str | None = None,
    use_gpu: bool | None = None,
    precision: str | None = None,
    gpus_per_actor: float = 1.0,
    model_actors: int | None = None,
) -> ScreeningResult | None:
    """Screen the objects of a run that failed with a code of `OF_STORAGE`, or under another version
    of lungopacity with one of `OF_VERSION`, and publish them as a new run.

    Objects that a later run has read are left out, unless they were replaced since then. Returns
    None if no objects are left. The old run stays as it is. The new one names it as `retry_of`, and
    the view `latest` of `query` shows the new rows. `model`: the URI of the run's model, if that
    was moved. `hmac_key`: the run's own, if it had one. `precision`: another than the run's, for
    example if there is no GPU now. `gpus_per_actor`, `model_actors`: as in screening. Raises
    `UserError`, also if another run reads some of the objects meanwhile.
    """
    began = time.monotonic()
    store = open_store(results)
    record = _record_of(store, run_id)
    failed, _ = _failed(store, record)
    if not failed:
        return None
    settings = record.get("settings", {})
    model = model or record.get("model")
    if model is None:
        raise UserError(f"run '{run_id}' does not record where its model is; give --model URI")
    job = screening_job(
        model,
        results,
        accept=settings.get("accept", ()),
        reject_quality=settings.get("reject_quality"),
        # As in a nightly run, objects that fail again do not make the run broken.
        max_failed_fraction=1.0,
        hmac_key=hmac_key,
        hash_keys=settings.get("key_map") is not None,
        key_map=settings.get("key_map"),
        labels=labels,
        operating_point=settings.get("operating_point"),
        explain=settings.get("explain", False),
        precision=precision or settings.get("precision", FLOAT32),
        batch_size=settings.get("batch_size"),
        use_gpu=use_gpu,
        gpus_per_actor=gpus_per_actor,
        model_actors=model_actors,
        noted={"retry_of": run_id},
    )
    _check_same(job, record, settings)
    if job.key_map is not None:
        failed = _named(failed, job.key_map, run_id)
    archive: str = record["archive"]

    def not_read_since() -> pa.Table:
        return _not_read_since(job, archive, _as_they_are_now(archive, failed))

    objects = not_read_since()
    if not objects.num_rows:
        return None

    def check() -> None:
        read = set(objects["image"].to_pylist()).difference(not_read_since()["image"].to_pylist())
        if read:
            raise UserError(
                f"another run has read {counted(len(read), 'object')} meanwhile, and its rows must "
                "stay the newest; nothing was published; run the same command again for the others"
            )

    return run_job(
        job,
        Inventory(archive, iter([objects])),
        began,
        before_commit=check,
        go_on="run the same command again to start over",
    )


def left_alone(results: str, run_id: str) -> Mapping[str, int]:
    """Number of failed images of the run that `retry` does not try again, by error code."""
    store = open_store(results)
    return _failed(store, _record_of(store, run_id))[1]


def _record_of(store: Store, run_id: str) -> dict[str, Any]:
    record = read_run(store, run_id)
    if record is None:
        raise UserError(
            f"{store.uri}: there is no published run '{run_id}'; see `lungopacity runs`"
        )
    return record


def _failed(store: Store, record: dict[str, Any]) -> tuple[list[str], Mapping[str, int]]:
    """Names of the objects to try again, as the run published them; and how many other images
    failed, by error code."""
    with files_of_runs(store):
        rows = predictions_of(store, [record]).to_table(columns=["image", "status", "error_code"])
    rows = rows.filter(pc.equal(rows["status"], Status.FAILED.value))
    codes = OF_STORAGE | OF_VERSION if of_other_version(record) else OF_STORAGE
    wanted = pa.array(sorted(code.value for code in codes))
    again = pc.unique(rows.filter(pc.is_in(rows["error_code"], wanted))["image"])
    others = rows.filter(pc.invert(pc.is_in(rows["image"], again)))
    return sorted(again.to_pylist()), Counter(others["error_code"].to_pylist())


def _named(hashes: list[str], key_map: str, run_id: str) -> list[str]:
    names = read_key_map(key_map, run_id)
    lacking = sum(hashed not in names for hashed in hashes)
    if lacking:
        raise UserError(
            f"{key_map}/{run_id}.parquet: {lacking} of the names that the run hashed are missing; "
            "restore the file"
        )
    return [names[hashed] for hashed in hashes]


def _check_same(job: ScreeningJob, record: dict[str, Any], settings: dict[str, Any]) -> None:
    if job.model.model_id != record["model_id"]:
        raise UserError(
            f"{job.model_uri} holds model {job.model.model_id}, but the run used "
            f"{record['model_id']}; give the URI of that model as --model"
        )
    # The new rows will be read together with the run's other rows, so their decisions must agree.
    # The earliest records lack some of these settings.
    then = {**settings, "positive_class": record["positive_class"]}
    for name, now in job.rules.settings().items():
        # `by_view` did not exist, so no film was decided by its view.
        before = then.get(name, None if name == "by_view" else now)
        if name in ("positive_class", "threshold", "review_from", "by_view") and before != now:
            raise UserError(
                f"the run decided with {name} {before}, but {job.model_uri} now has {now}; "
                "give the model folder that the run used as --model, or screen again"
            )
    fingerprint = settings.get("hmac_key_fingerprint")
    if job.rules.hmac_key_fingerprint != fingerprint:
        raise UserError(
            f"the run was made {'with another' if fingerprint else 'without a'} key for names; "
            f"{'give that key as' if fingerprint else 'leave out'} --hmac-key"
        )


def _as_they_are_now(archive: str, keys: list[str]) -> pa.Table:
    """The objects (`PLAN_SCHEMA`) with their present etags. One that is gone or forbidden stays in
    the list, and reading it will give the error. Raises `UserError` if none of them can be looked
    up."""
    store = open_store(archive)
    refusals: list[UserError] = []

    def found(key: str) -> ObjectInfo:
        try:
            return store.head(key) or ObjectInfo.gone(key)
        except UserError as error:
            refusals.append(error)
            return ObjectInfo.gone(key)

    with ThreadPoolExecutor(_HEAD_THREADS) as threads:
        objects = list(threads.map(found, keys))
    if len(refusals) == len(keys):
        raise refusals[0]
    return plan_table(objects)


def _not_read_since(job: ScreeningJob, archive: str, objects: pa.Table) -> pa.Table:
    """Those of the objects that no later run has read. The rows of a later run must not be replaced
    by a failure of today, or by decisions at an older operating point."""
    history = History.read(job.results, archive, job.model.model_id, job.rules, job.pseudonyms)
    with workbench() as (connection, _):
        history.load(connection)
        connection.register("objects", objects)
        unread = connection.sql(
            f"SELECT * FROM ({history.to_screen('objects', keep_gone=True)}) ORDER BY image"
        ).to_arrow_table()
    return unread.select(PLAN_SCHEMA.names).cast(PLAN_SCHEMA)
