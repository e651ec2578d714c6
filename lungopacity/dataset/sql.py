"""Answers SQL over users' tables, CSV or Parquet."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import duckdb
import pandas as pd

from lungopacity.dataset.tables import ANY_SEPARATOR, bytes_of, csv_rows, csv_text
from lungopacity.errors import UserError, first_line
from lungopacity.results.workbench import quoted, reason_of, tables_in_memory

_NUMBERS = {
    "BIGINT": r"-?(0|[1-9]\d{0,17})",
    "DOUBLE": r"-?(0|[1-9]\d{0,8})(\.\d+)?(e-\d+)?",
}
"""A CSV's column becomes numbers of this type if all its values match the pattern; otherwise it is
text. DuckDB itself would read 007 and a patient's number of 36 digits as numbers, and lose
digits."""


def answer_of(sql: str, tables: Mapping[str, str], called: str) -> pd.DataFrame:
    """The result of `sql` over the tables. called: what messages call the SQL."""
    _check_names(tables)
    with tables_in_memory() as (connection, folder):
        for name, uri in tables.items():
            path = folder / f"{name}.table"
            data = bytes_of(uri)
            is_csv = data[:4] != b"PAR1"
            if is_csv:
                reader = _csv_reader(data, uri, path)
            else:
                path.write_bytes(data)
                reader = f"read_parquet({quoted(path)})"
            try:
                connection.execute(f'CREATE TABLE "{name}" AS SELECT * FROM {reader}')
            except duckdb.Error as error:
                raise UserError(
                    f"{uri}: is neither CSV nor Parquet ({first_line(error)})"
                ) from error
            if is_csv:
                _make_numbers(connection, name)
        connection.execute("SET enable_external_access = false")
        try:
            answer = connection.sql(sql)
            return pd.DataFrame() if answer is None else answer.df()
        except duckdb.Error as error:
            raise UserError(f"{called}: {reason_of(error)}") from error


def _csv_reader(data: bytes, uri: str, path: Path) -> str:
    """The SQL that reads a CSV as text. path: where it is written to, with commas between fields.

    DuckDB could find out the dialect itself, but would skip lines or take one for a header without
    a word, and its errors do not say what to do.
    """
    rows = csv_rows(csv_text(data, uri), uri, ANY_SEPARATOR)
    header = [name or f"column{n}" for n, name in enumerate(next(rows))]
    for name, times in Counter(name.lower() for name in header).items():
        if times > 1:
            raise UserError(
                f"{uri}: {times} columns are named '{name}' but for capitals, which SQL ignores; "
                "rename or remove all but one"
            )
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    columns = ", ".join(f"{quoted(name)}: 'VARCHAR'" for name in header)
    return (
        f"read_csv({quoted(path)}, auto_detect = false, header = false, delim = ',', "
        f"quote = '\"', escape = '\"', new_line = '\\n', columns = {{{columns}}})"
    )


def _make_numbers(connection: duckdb.DuckDBPyConnection, table: str) -> None:
    """Converts the columns of text that hold only numbers; see `_NUMBERS`."""
    for name, *_ in connection.execute(f'DESCRIBE "{table}"').fetchall():
        column = '"' + name.replace('"', '""') + '"'
        for kind, pattern in _NUMBERS.items():
            like = f"bool_and(regexp_full_match({column}, {quoted(pattern)}))"
            if connection.execute(f'SELECT {like} FROM "{table}"').fetchall() == [(True,)]:
                connection.execute(f'ALTER TABLE "{table}" ALTER {column} TYPE {kind}')
                break


def _check_names(tables: Mapping[str, str]) -> None:
    for name in tables:
        if not re.fullmatch(r"\w{1,64}", name):
            raise UserError(f"--table {name}=…: a name consists of up to 64 letters, digits and _")
    if len({name.lower() for name in tables}) < len(tables):
        raise UserError(
            f"--table: of {', '.join(tables)}, some differ only in capitals, which SQL ignores; "
            "choose other names"
        )
