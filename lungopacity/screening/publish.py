"""Merge the part files of all attempts into one published run: each image of the plan exactly once,
or no run at all."""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from lungopacity.results.workbench import (
    ExportedFile,
    export,
    is_full_disk,
    quoted,
    view_of_files,
    workbench,
)
from lungopacity.screening.plan import Plan, mark_published
from lungopacity.screening.pseudonyms import Pseudonyms, write_key_map
from lungopacity.storage import Store

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

_FETCH_THREADS = 16
_DELETE_THREADS = 16

# All rows of one pass over a shard share a `reading`. Rows of two passes are never mixed, because
# the passes may have read different content. A pass is whole if it has as many rows as its closing
# row counts. The first whole pass is the one that is published.
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

# If one attempt could not read an object and another read it as several images, the several images
# count. Of repeated rows, a scored one counts, then the earliest.
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

# All frames of a file share its name and its label.
_NAMES = """
CREATE TABLE names AS
SELECT coalesce(member, image) AS name, min(image) AS object,
    count(DISTINCT (image, member_index)) AS files
FROM final GROUP BY name"""


@dataclass(frozen=True)
class Collected:
    """What the attempts have written so far, as DuckDB tables."""

    plan: Plan
    class_names: tuple[str, ...]
    connection: Any
    folder: Path

    def missing(self, folder: Path, stem: str) -> list[Path]:
        """Write the objects that still have to be screened to files in `folder`, sorted as
        `Plan.files`. Returns no files if all objects are done."""
        files = export(
            self.connection,
            "SELECT * FROM plan ANTI JOIN done USING (image) ORDER BY image",
            PLAN_SCHEMA,
            folder,
            stem,
        )
        return [file.path for file in files]

    def finish(self, *, synthetic_model: bool) -> None:
        """Create the table `final`: a row of `predictions_schema` for each image of the plan,
        without labels.

        Raises `RuntimeError` if the objects in the table and in the plan differ: nothing may be
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
            raise RuntimeError(f"{unplanned} objects are not in the plan, {missing} have no row")

    def label(self, labels: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
        """Write the label of each image to the table `final`.

        labels: as `read_labels` returns them. A name in the labels that is not the full name of an
        image is matched by `names_by_ending`. Returns the labels that have an image, with `image`
        named as in the archive, and a line of text for each ambiguous match. Ambiguous matches give
        no label.
        """
        import pandas as pd

        self.connection.register(
            "named", pa.table({"name": pa.array(labels["image"], pa.string())})
        )
        self.connection.execute(_NAMES)
        whole = self.connection.execute(
            "SELECT name FROM names SEMI JOIN named USING (name)"
        ).fetchall()
        others = self.connection.sql(
            "SELECT name FROM names ANTI JOIN named USING (name) ORDER BY name"
        )
        name_of, doubts = names_by_ending(
            (name for batch in others.to_arrow_reader() for name in batch["name"].to_pylist()),
            set(labels["image"]).difference(name for (name,) in whole),
        )
        name_of |= {name: name for (name,) in whole}
        self.connection.register("meant", pa.table({"name": pa.array(list(name_of), pa.string())}))
        several = self.connection.execute(
            "SELECT name, object FROM names SEMI JOIN meant USING (name) WHERE files > 1 ORDER BY 1"
        ).fetchall()
        for name, container in several:
            del name_of[name]
            doubts.append(f"{name} is in {container} and in another object")
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
        """Write the table `final` to the results as compact files, sorted by `image`. Returns the
        key, number of rows and SHA-256 of each file.

        `pseudonyms`: if they have a key map, names of objects are hashed in the files.
        """
        start = self.plan.start
        if pseudonyms is None or pseudonyms.key_map is None:
            rows = "SELECT * FROM final ORDER BY image, member_index, frame"
            exported = self._exported(rows, lambda table: table)
        else:
            exported, names = self._exported_hashed(pseudonyms)
            # Written before the results: hashes without a map would be of no use.
            write_key_map(pseudonyms.key_map, start.run_id, names)
        # A random part in the names: another job that publishes the same run writes other files,
        # so nobody else touches the files that the winner's commit record names.
        attempt = uuid.uuid4().hex[:8]
        files = []
        for number, file in enumerate(exported):
            data = file.path.read_bytes()
            key = predictions_key(start.screened_on, start.run_id, attempt, number)
            results.write(key, data)
            sha256 = hashlib.sha256(data).hexdigest()
            files.append({"key": key, "rows": file.rows, "sha256": sha256})
        return files

    def _exported(self, rows: str, shown: Callable[[pa.Table], pa.Table]) -> list[ExportedFile]:
        """Write the rows of a query over `final` to local files, each table as `shown` returns
        it."""
        ((total,),) = self.connection.execute("SELECT count(*) FROM final").fetchall()
        with Progress("Publishing", total=total, quick=True) as progress:

            def published(table: pa.Table) -> pa.Table:
                progress.advance(table.num_rows)
                return shown(table)

            return export(
                self.connection,
                rows,
                predictions_schema(self.class_names),
                self.folder,
                "predictions",
                published,
            )

    def _exported_hashed(self, pseudonyms: Pseudonyms) -> tuple[list[ExportedFile], dict[str, str]]:
        """The table `final` in local files with names hashed, and the name behind each hash."""
        names: dict[str, str] = {}

        def hashed(table: pa.Table) -> pa.Table:
            table, found = pseudonyms.hash_names(table)
            names.update(found)
            return table

        # Sorting by name would hint at which name is behind which hash. So would the time at
        # which each object was screened, because that roughly follows the order of the names.
        self.connection.create_function("hashed", pseudonyms.hashed, ["VARCHAR"], "VARCHAR")
        rows = (
            "SELECT final.* REPLACE ((SELECT max(screened_at) FROM final) AS screened_at)"
            " FROM final JOIN (SELECT image, hashed(image) AS hash"
            " FROM (SELECT DISTINCT image FROM final)) USING (image)"
            " ORDER BY hash, member_index, frame"
        )
        return self._exported(rows, hashed), names


@contextmanager
def collect(results: Store, plan: Plan, class_names: Sequence[str]) -> Iterator[Collected]:
    """Read every part file of the run.

    A damaged part file counts as never written: its objects are missing. Raises `UserError` if
    another job has published the run meanwhile, or if a part file cannot be read for another
    reason.
    """
    import duckdb

    with workbench() as (connection, folder):
        keys = [
            item.key
            for item in results.list(f"{plan.work}attempt=")
            if item.key.endswith(".parquet")
        ]
        # Checked after the listing: a job that publishes removes the part files, and their rows
        # would seem to be missing.
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
                            "%s/%s is damaged and is ignored: the objects in it are screened again",
                            results.uri,
                            key,
                        )
                    progress.advance(1)
        except ImageError as error:
            if read_run(results, plan.start.run_id) is not None:
                raise published_meanwhile(plan.start.run_id) from error
            fix = (
                "resume the run to try again"
                if error.may_pass
                else "move it away and resume the run to screen its objects again"
            )
            raise UserError(
                f"{results.uri}/{key}: this part file of run '{plan.start.run_id}' cannot be read "
                f"({error.message}); {fix}"
            ) from error
        try:
            view_of_files(connection, "written", local, part_schema(class_names))
            view_of_files(connection, "plan", plan.files, PLANNED_SCHEMA)
            connection.execute(_WHOLE_READINGS)
            connection.execute(_DONE)
            # DuckDB reads most columns of the files only when the block asks for them.
            yield Collected(plan, tuple(class_names), connection, folder)
        except duckdb.Error as error:
            if is_full_disk(error):
                raise
            # With results on disk, `local` holds the part files themselves, not copies, and the job
            # that published may have removed them.
            if read_run(results, plan.start.run_id) is not None:
                raise published_meanwhile(plan.start.run_id) from error
            raise UserError(
                f"run '{plan.start.run_id}' cannot continue: its plan, or a part file in "
                f"{plan.work}, cannot be read ({first_line(error)}); choose another --run-id"
            ) from error


def remove_work(results: Store, plan: Plan) -> None:
    """Delete the work files of a published run. A failure is logged: the run stays published."""
    try:
        # Done first, because it takes one request and no right to delete. Without the mark, a run
        # withdrawn by deleting its record would look like one that was never published.
        mark_published(results, plan.start)
        start = start_key(plan.start.run_id)
        keys = [item.key for item in results.list(plan.work) if item.key != start]
        with (
            ThreadPoolExecutor(_DELETE_THREADS) as threads,
            Progress("Removing its work", len(keys) + 1, unit="files", quick=True) as progress,
        ):
            for _ in threads.map(results.delete, keys):
                progress.advance(1)
            # Deleted last: while it exists, nothing takes the remaining files for a new run's work.
            results.delete(start)
            progress.advance(1)
    except UserError as error:
        # Some users may write but not delete.
        log.warning(
            "the run is published, but its work files could not be removed (%s); run "
            "`lungopacity clean` with the right to delete",
            error,
        )
