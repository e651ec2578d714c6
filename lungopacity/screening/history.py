"""What published runs have already screened, so that a night screens only the rest."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lungopacity.errors import OF_STORAGE, OF_VERSION, ErrorCode, Status
from lungopacity.results.folder import read_runs
from lungopacity.results.query import files_of_runs, predictions_of, run_places
from lungopacity.results.workbench import quoted
from lungopacity.runtime import versions
from lungopacity.screening.pseudonyms import Pseudonyms
from lungopacity.screening.rules import Rules
from lungopacity.storage import ObjectInfo, Store

log = logging.getLogger(__name__)

_RULES = ("accept", "reject_quality")
_POINT = ("threshold", "review_from", "by_view")


@dataclass(frozen=True)
class History:
    """Published runs over one archive with one model and positive class, whose names of objects can
    be compared with a listing.

    An object counts as screened if its newest rows have its present etag and size, and none of them
    needs another attempt. A row does if it failed for a reason of the storage, if it failed under
    another version of lungopacity with a code of `OF_VERSION`, or if it was rejected by other rules
    than today's. Decisions made at another operating point stay; a warning counts them.
    """

    results: Store
    runs: Sequence[Mapping[str, Any]]
    """Commit records, oldest first."""
    rules: Rules
    pseudonyms: Pseudonyms | None
    published: Sequence[Mapping[str, Any]]
    """Commit records of all runs, whether they count or not."""

    @staticmethod
    def read(
        results: Store,
        archive: str,
        model_id: str,
        rules: Rules,
        pseudonyms: Pseudonyms | None,
    ) -> History:
        """The runs that count, see `is_of_kind`."""
        records = read_runs(results)
        runs = [run for run in records if is_of_kind(run, archive, model_id, rules)]
        hashed = pseudonyms if rules.hash_keys else None
        return History(results, runs, rules, hashed, records)

    def load(self, connection: Any) -> None:
        """Create the table `screened` (name, version, again, decided, place) in DuckDB; see
        `_number`.

        Raises `UserError` if a file that a commit record names cannot be read.
        """
        other_rules = self._that_differ_in(_RULES)
        connection.register("run_places", run_places(self.runs))
        connection.register("other_rules", pa.table({"run_id": pa.array(other_rules, pa.string())}))
        other_version = pa.array(
            [run["run_id"] for run in self.runs if of_other_version(run)], pa.string()
        )
        connection.register("other_version", pa.table({"run_id": other_version}))
        # The largest place * 2 + again comes from the newest run, and is odd if any of its rows
        # needs another attempt. So it is with decided.
        with files_of_runs(self.results):
            connection.register("history", predictions_of(self.results, self.runs))
            connection.execute(f"""
                CREATE TABLE screened AS
                SELECT name, arg_max(version, place) AS version,
                       max(2 * place + again::INTEGER) % 2 = 1 AS again,
                       max(2 * place + decided::INTEGER) % 2 = 1 AS decided,
                       max(place) AS place
                FROM (
                    SELECT {_number("image")} AS name, {_VERSION} AS version, place,
                           status = {quoted(Status.OK.value)} AS decided,
                           (status = {quoted(Status.FAILED.value)}
                            AND (error_code IN {_listed(OF_STORAGE)}
                                 OR error_code IN {_listed(OF_VERSION)}
                                    AND run_id IN (SELECT run_id FROM other_version)))
                           OR (status = {quoted(Status.REJECTED.value)}
                               AND run_id IN (SELECT run_id FROM other_rules)) AS again
                    FROM history JOIN run_places USING (run_id)
                )
                GROUP BY name""")
        self._warn_of_other_points(connection)
        if self.pseudonyms is not None:
            connection.create_function("hashed", self.pseudonyms.hashed, ["VARCHAR"], "VARCHAR")

    def _that_differ_in(self, names: Sequence[str]) -> list[str]:
        """Ids of the runs whose rules of these names differ from today's."""
        return [
            run["run_id"]
            for run in self.runs
            if not set(names).isdisjoint(self.rules.that_differ(_settings(run)))
        ]

    def _warn_of_other_points(self, connection: Any) -> None:
        others = self._that_differ_in(_POINT)
        if not others:
            return
        connection.register("other_points", pa.table({"run_id": others}))
        ((objects,),) = connection.execute(
            "SELECT count(*) FROM screened JOIN run_places USING (place) "
            "SEMI JOIN other_points USING (run_id) WHERE decided AND NOT again"
        ).fetchall()
        if objects:
            log.warning(
                "%d objects keep decisions made at another operating point: a night screens only "
                "what is new; `lungopacity screen` decides all again",
                objects,
            )

    def to_screen(self, listed: str, *, keep_gone: bool = False) -> str:
        """SQL that selects the rows of the table `listed` that have to be screened. Call `load`
        first.

        Column `tried`: place of the newest run that tried the object with its present content; null
        if none did. `keep_gone`: an object that is `gone` counts as it was when it was last tried,
        so that what was read before it was removed keeps its rows.
        """
        name = "image" if self.pseudonyms is None else "hashed(image)"
        same = f"{_VERSION} = known.version"
        if keep_gone:
            same = f"({same} OR source_etag = {quoted(ObjectInfo.gone('').etag)})"
        return f"""
            SELECT {listed}.*, known.place AS tried FROM {listed} LEFT JOIN screened known
            ON {_number(name)} = known.name AND {same}
            WHERE known.name IS NULL OR known.again
        """


def is_of_kind(run: Mapping[str, Any], archive: str, model_id: str, rules: Rules) -> bool:
    """Whether the published run has this archive and model, the positive class of the rules, and
    names objects as the rules do.

    Plain names, hashed names and names hashed with another key cannot be compared: changing between
    them screens the archive again.
    """
    hashed = hides_names(run)
    return (
        (run["archive"], run["model_id"]) == (archive, model_id)
        and run["positive_class"] == rules.positive_class
        and hashed == rules.hash_keys
        and not (hashed and "hmac_key_fingerprint" in rules.that_differ(_settings(run)))
    )


def hides_names(run: Mapping[str, Any]) -> bool:
    """Whether the published run has hashes instead of the names of objects."""
    return _settings(run).get("key_map") is not None


def all_hide_names(runs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there are published runs, and none shows the name of an object."""
    return bool(runs) and all(map(hides_names, runs))


def of_other_version(run: Mapping[str, Any]) -> bool:
    """Whether another version of lungopacity made the run: this one may read what that could
    not."""
    then: object = run.get("versions", {}).get("lungopacity")
    return then != versions()["lungopacity"]


def _listed(codes: Collection[ErrorCode]) -> str:
    return f"({', '.join(quoted(code.value) for code in sorted(codes))})"


def _number(text: str) -> str:
    """SQL that hashes a text to a 128-bit number. As numbers, ten million names of any length join
    and group in a third of the time and without going to disk. Among 10^10 names, the chance that
    any two share a number is 10^-19."""
    return f"md5_number({text})"


_VERSION = _number("source_etag || ':' || source_size_bytes")


def _settings(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings in a commit record; records of the first version have none."""
    settings: Mapping[str, Any] = run.get("settings", {})
    return settings
