"""Part files of all attempts to one published run: each image of the plan once, or nothing."""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa

from lungopacity.archive.names import names_by_ending
from lungopacity.errors import ImageError, UserError, first_line
from lungopacity.progress import Progress
from lungopacity.results.folder import (
    predictions_key,
    published_meanwhile,
    read_run,
    start_key,
    work_file,
)
from lungopacity.results.schema import PLAN_SCHEMA, PLANNED_SCHEMA, part_schema, predictions_schema
from lungopacity.results.workbench import export, is_full_disk, quoted, view_of_files, workbench
from lungopacity.screening.plan import Plan, mark_published
from lungopacity.screening.pseudonyms import Pseudonyms, write_key_map
from lungopacity.storage import Store

log = logging.getLogger(__name__)

_FETCH_THREADS = 16
_DELETE_THREADS = 16

# Rows of one pass over an object have its `reading`; the passes of two attempts are never mixed,
# for they may have met different content. A pass is whole when it has as many rows as the marker
# at its end counts; of whole passes the first one counts.
_WHOLE_READINGS = """
CREATE TABLE whole AS
SELECT image, arg_min(reading, ended) AS reading FROM (
    SELECT image, reading, any_value(shard_rows) AS expected, min(screened_at) AS ended
    FROM written WHERE shard_rows IS NOT NULL GROUP BY image, reading
) JOIN (
    SELECT reading, count(*) AS found
    FROM (SELECT DISTINCT reading, member_index, frame FROM written
          WHERE reading IS NOT NULL AND shard_rows IS NULL)
    GROUP BY reading
) USING (reading)
WHERE found = expected
GROUP BY image"""

_DONE = """
CREATE TABLE done AS
SELECT image FROM written WHERE reading IS NULL
UNION SELECT image FROM whole"""

# An object that one attempt could not read, and another read as several images, is the latter. Of
# repeats a readable one counts, then the earliest.
_ROWS = """
CREATE TABLE final AS
SELECT {columns} FROM (
    SELECT * FROM written
    WHERE shard_rows IS NULL
      AND (reading IS NULL AND image NOT IN (SELECT image FROM whole)
           OR reading IN (SELECT reading FROM whole))
    QUALIFY row_number() OVER (
        PARTITION BY image, member_index, frame ORDER BY status <> 'ok', screened_at
    ) = 1
)"""

# Several frames of one file share its name, and its label.
_NAMES = """
CREATE TABLE names AS
SELECT coalesce(member, image) AS name, min(image) AS object,
    count(DISTINCT (image, member_index)) AS files
FROM final GROUP BY name"""


@dataclass(frozen=True)
class Collected:
    """What the attempts have written so far, in DuckDB."""

    plan: Plan
    class_names: tuple[str, ...]
    connection: Any
    folder: Path

    def missing(self, folder: Path, stem: str) -> list[Path]:
        """Files of the objects that still have to be screened, sorted as `Plan.files`; none if all
        are done. `folder` is the caller's."""
        files = export(
            self.connection,
            "SELECT * FROM plan ANTI JOIN done USING (image) ORDER BY image",
            PLAN_SCHEMA,
            folder,
            stem,
        )
        return [file.path for file in files]

    def finish(self, *, synthetic_model: bool) -> None:
        """Make the table `final`: a row of `predictions_schema` for each image of the plan, without
        labels.

        Raises `RuntimeError` where objects of the table and of the plan differ: nothing may be
        published then.
        """
        start = self.plan.start
        constant = {
            "label": "NULL::VARCHAR",
            "run_id": quoted(start.run_id),
            "model_id": quoted(start.model_id),
            "archive": quoted(start.archive),
        }
        if synthetic_model:
            constant["synthetic"] = "true"
        columns = ", ".join(
            f'{constant[name]} AS "{name}"' if name in constant else f'"{name}"'
            for name in predictions_schema(self.class_names).names
        )
        self.connection.execute(_ROWS.format(columns=columns))
        ((unplanned, missing),) = self.connection.execute(
            "SELECT (SELECT count(*) FROM (SELECT DISTINCT image FROM final)"
            "        ANTI JOIN plan USING (image)),"
            "       (SELECT count(*) FROM plan ANTI JOIN final USING (image))"
        ).fetchall()
        if unplanned or missing:
            raise RuntimeError(f"{unplanned} objects are not of the plan, {missing} have no row")

    def label(self, labels: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
        """Give each image of `final` its label.

        labels: as `read_labels` gives them. A name that no image has whole means the image that
        `names_by_ending` finds. The rows of labels that have an image, `image` as it is named in
        the archive; and what there is to say of names that do not tell which image they mean: these
        give none a label.
        """
        self.connection.register("told", pa.table({"name": pa.array(labels["image"], pa.string())}))
        self.connection.execute(_NAMES)
        whole = self.connection.execute(
            "SELECT * FROM names SEMI JOIN told USING (name)"
        ).fetchall()
        others = self.connection.sql(
            "SELECT name FROM names ANTI JOIN told USING (name) WHERE files = 1 ORDER BY name"
        )
        name_of, doubts = names_by_ending(
            (name for batch in others.to_arrow_reader() for name in batch["name"].to_pylist()),
            set(labels["image"]).difference(name for name, _, _ in whole),
        )
        for name, container, files in whole:
            if files == 1:
                name_of[name] = name
            else:
                doubts.append(f"{name} is in {container} and in another")
        known = pd.DataFrame({"image": name_of.values(), "file": name_of.keys()}, dtype=object)
        found = labels.merge(known, on="image")
        found = found.assign(image=found.pop("file"))
        self.connection.register(
            "labels",
            pa.table({name: pa.array(found[name], pa.string()) for name in ("image", "label")}),
        )
        self.connection.execute(
            "UPDATE final SET label = labels.label FROM labels"
            " WHERE labels.image = coalesce(final.member, final.image)"
        )
        return found, doubts

    def write(self, results: Store, pseudonyms: Pseudonyms | None) -> list[dict[str, Any]]:
        """Put the compact files of the table `final`, sorted by `image`; each one's key, rows and
        hash.

        `pseudonyms`: with a key map, names of objects are hashed in the files.
        """
        start = self.plan.start
        names: dict[str, str] = {}
        rows = "SELECT * FROM final ORDER BY image, member_index, frame"
        ((total,),) = self.connection.execute("SELECT count(*) FROM final").fetchall()
        progress = Progress("Publishing", total=total, quick=True)

        def published(rows: pa.Table) -> pa.Table:
            if pseudonyms is not None and pseudonyms.key_map is not None:
                rows, found = pseudonyms.hash_names(rows)
                names.update(found)
            progress.advance(rows.num_rows)
            return rows

        if pseudonyms is not None and pseudonyms.key_map is not None:
            # The order of the names, and the moment at which each was screened, which follows it,
            # would tell which name may hide behind which.
            self.connection.create_function("hashed", pseudonyms.hashed, ["VARCHAR"], "VARCHAR")
            rows = (
                "SELECT final.* REPLACE ((SELECT max(screened_at) FROM final) AS screened_at)"
                " FROM final JOIN (SELECT image, hashed(image) AS hash"
                " FROM (SELECT DISTINCT image FROM final)) USING (image)"
                " ORDER BY hash, member_index, frame"
            )
        with progress:
            exported = export(
                self.connection,
                rows,
                predictions_schema(self.class_names),
                self.folder,
                "predictions",
                published,
            )
        if pseudonyms is not None and pseudonyms.key_map is not None:
            # Before the results: hashes without a map would be of no use to anyone.
            write_key_map(pseudonyms.key_map, start.run_id, names)
        # Named by this attempt: another job that publishes the same run writes other files, and
        # the record of the one that comes first names what nobody else has touched.
        attempt = uuid.uuid4().hex[:8]
        files = []
        for number, file in enumerate(exported):
            data = file.path.read_bytes()
            key = predictions_key(start.screened_on, start.run_id, attempt, number)
            results.write(key, data)
            sha256 = hashlib.sha256(data).hexdigest()
            files.append({"key": key, "rows": file.rows, "sha256": sha256})
        return files


@contextmanager
def collect(results: Store, plan: Plan, class_names: Sequence[str]) -> Iterator[Collected]:
    """Read every part file of the run.

    One that is damaged counts as never written: its objects are missing. Raises `UserError` where
    another job has published the run meanwhile, and removed them; and where one cannot be read for
    another reason.
    """
    with workbench() as (connection, folder):
        keys = [
            item.key
            for item in results.list(f"{plan.work}attempt=")
            if item.key.endswith(".parquet")
        ]
        # After the listing: whoever publishes removes the parts, and they would seem to be lost.
        if read_run(results, plan.start.run_id) is not None:
            raise published_meanwhile(plan.start.run_id)
        parts = folder / "parts"
        parts.mkdir()
        try:
            with (
                ThreadPoolExecutor(_FETCH_THREADS) as threads,
                Progress("Collecting", total=len(keys), unit="files", quick=True) as progress,
            ):
                targets = [parts / f"{number}.parquet" for number in range(len(keys))]
                found = threads.map(partial(work_file, results), keys, targets)
                local = []
                for key in keys:
                    path = next(found)
                    if path is not None:
                        local.append(path)
                    else:
                        log.warning(
                            "%s/%s is damaged, and counts as never written: what it held is "
                            "screened again",
                            results.uri,
                            key,
                        )
                    progress.advance(1)
        except ImageError as error:
            if read_run(results, plan.start.run_id) is not None:
                raise published_meanwhile(plan.start.run_id) from error
            mend = "take the run up again" + (
                "" if error.may_pass else " without it: what it held is screened again"
            )
            raise UserError(
                f"{results.uri}/{key}: this part file of run '{plan.start.run_id}' cannot be read "
                f"({error.message}); it is kept: {mend}"
            ) from error
        try:
            view_of_files(connection, "written", local, part_schema(class_names))
            view_of_files(connection, "plan", plan.files, PLANNED_SCHEMA)
            connection.execute(_WHOLE_READINGS)
            connection.execute(_DONE)
            # Most columns of the files are read only now, by those who ask for them.
            yield Collected(plan, tuple(class_names), connection, folder)
        except duckdb.Error as error:
            if is_full_disk(error):
                raise
            # In a folder, these are the files themselves.
            if read_run(results, plan.start.run_id) is not None:
                raise published_meanwhile(plan.start.run_id) from error
            raise UserError(
                f"run '{plan.start.run_id}' cannot go on: its plan, or a part file below "
                f"{plan.work}, cannot be read ({first_line(error)}); choose another --run-id"
            ) from error


def remove_work(results: Store, plan: Plan) -> None:
    """Delete what the attempts wrote; the run is published, whatever becomes of this."""
    try:
        # First, for it takes one request, and no right to delete: or a run whose record is deleted,
        # to withdraw it, would look like one that was never published.
        mark_published(results, plan.start)
        start = start_key(plan.start.run_id)
        keys = [item.key for item in results.list(plan.work) if item.key != start]
        with (
            ThreadPoolExecutor(_DELETE_THREADS) as threads,
            Progress("Removing its work", len(keys) + 1, unit="files", quick=True) as progress,
        ):
            for _ in threads.map(results.delete, keys):
                progress.advance(1)
            # Last: while it lies there, nobody takes what is left for the work of a new run.
            results.delete(start)
            progress.advance(1)
    except UserError as error:
        # Some may write and not remove.
        log.warning(
            "the run is published; its work could not be removed (%s), `lungopacity clean` will do "
            "it where it may",
            error,
        )
