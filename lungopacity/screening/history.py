"""What published runs have screened already, so that a night screens the rest."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lungopacity.errors import OF_STORAGE, OF_VERSION, ErrorCode, Status
from lungopacity.results.folder import newest_sequence, read_runs
from lungopacity.results.query import files_of_runs, predictions_of, run_places
from lungopacity.results.workbench import quoted
from lungopacity.runtime import versions
from lungopacity.screening.pseudonyms import Pseudonyms
from lungopacity.screening.rules import Rules
from lungopacity.storage import Store

log = logging.getLogger(__name__)

_RULES = ("accept", "reject_quality")
_POINT = ("threshold", "review_from")


@dataclass(frozen=True)
class History:
    """Published runs over one archive with one model, that decided about one class, and whose names
    can be compared with a listing's.

    An object is screened when its newest rows are of its present etag and size, and need no other
    attempt: none of them failed by the storage's fault, or by one of another version, and none was
    rejected by other rules than those of today. What another operating point decided stays; a
    warning counts it.
    """

    results: Store
    runs: Sequence[Mapping[str, Any]]
    """Commit records, oldest first."""
    rules: Rules
    pseudonyms: Pseudonyms | None
    newest: int
    """The highest `sequence` of any run, see `newest_sequence`."""

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
        return History(results, runs, rules, hashed, newest_sequence(records))

    def load(self, connection: Any) -> None:
        """Create the table `screened` (name, version, again, place) in DuckDB; see `_number`.

        Raises `UserError` where a file that a commit record names cannot be read.
        """
        other_rules = self._that_differ_in(_RULES)
        connection.register("run_places", run_places(self.runs))
        connection.register("other_rules", pa.table({"run_id": pa.array(other_rules, pa.string())}))
        other_version = pa.array(
            [run["run_id"] for run in self.runs if of_other_version(run)], pa.string()
        )
        connection.register("other_version", pa.table({"run_id": other_version}))
        # place * 2 + again: the largest is of the newest run, and odd if any of its rows asks for
        # another attempt.
        with files_of_runs(self.results):
            connection.register("history", predictions_of(self.results, self.runs))
            connection.execute(f"""
                CREATE TABLE screened AS
                SELECT name, arg_max(version, place) AS version,
                       max(2 * place + again::INTEGER) % 2 = 1 AS again,
                       max(place) AS place
                FROM (
                    SELECT {_number("image")} AS name, {_VERSION} AS version, place,
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
        """Ids of the runs with other rules than those of today."""
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
            "SEMI JOIN other_points USING (run_id)"
        ).fetchall()
        if objects:
            log.warning(
                "%d objects were decided at another operating point, and stay so: a night screens "
                "what is new; `lungopacity screen` decides all anew",
                objects,
            )

    def to_screen(self, listed: str) -> str:
        """SQL of the rows of the table `listed` that have to be screened; after `load`.

        `tried`: place of the newest run that tried the object as it is now; null where none did.
        """
        name = "image" if self.pseudonyms is None else "hashed(image)"
        return f"""
            SELECT {listed}.*, known.place AS tried FROM {listed} LEFT JOIN screened known
            ON {_number(name)} = known.name AND {_VERSION} = known.version
            WHERE known.name IS NULL OR known.again
        """


def is_of_kind(run: Mapping[str, Any], archive: str, model_id: str, rules: Rules) -> bool:
    """Whether the published run is over the archive with the model, decided about the class of the
    rules, and names objects as they do.

    Results whose names are hashed, or hashed under another key, cannot be compared with plain ones:
    a change of that screens the archive again.
    """
    hashed = _settings(run).get("key_map") is not None
    return (
        (run["archive"], run["model_id"]) == (archive, model_id)
        and run["positive_class"] == rules.positive_class
        and hashed == rules.hash_keys
        and not (hashed and "hmac_key_fingerprint" in rules.that_differ(_settings(run)))
    )


def of_other_version(run: Mapping[str, Any]) -> bool:
    """Whether another version of lungopacity made the run: what it failed at, this one may not."""
    then: object = run.get("versions", {}).get("lungopacity")
    return then != versions()["lungopacity"]


def _listed(codes: Collection[ErrorCode]) -> str:
    return f"({', '.join(quoted(code.value) for code in sorted(codes))})"


def _number(text: str) -> str:
    """SQL of a 128-bit number for a text. Ten million names of any length join and group as
    numbers in a third of the time and without going to disk; that any two of 10^10 share a number
    has the chance 10^-19."""
    return f"md5_number({text})"


_VERSION = _number("source_etag || ':' || source_size_bytes")


def _settings(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a commit record; the first version had none."""
    settings: Mapping[str, Any] = run.get("settings", {})
    return settings
