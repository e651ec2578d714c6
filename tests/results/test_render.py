"""Answers to queries, as the command line prints them."""

import json

import duckdb
import pyarrow as pa
import pytest

from lungopacity.errors import UserError
from lungopacity.results.render import rendered


def test_json_has_null_where_it_has_no_number():
    table = pa.table({"value": [float("nan"), 1.5], "list": [[float("inf")], [2.0]]})
    lines = [json.loads(line, parse_constant=pytest.fail) for line in
             rendered(table, "json").splitlines()]  # fmt: skip
    assert lines == [{"value": None, "list": [None]}, {"value": 1.5, "list": [2.0]}]


def test_a_table_does_not_round_counts():
    table = pa.table({"value": [12345678.0, 0.123456789, float("nan"), 1e300]})
    assert rendered(table, "table").decode().split()[2:] == [
        "12345678",
        "0.123457",
        "nan",
        "1e+300",
    ]


def test_a_name_neither_tears_the_table_nor_commands_the_terminal():
    table = pa.table({"image": ["a\nb.png", "\x1b[31mred.png", "é.png"], "n": [1, 2, 3]})
    assert rendered(table, "table").decode().splitlines()[2:] == [
        r"a\nb.png         1",
        r"\x1b[31mred.png  2",
        r"é.png            3",
    ]


@pytest.mark.parametrize(
    ("sql", "formats"),
    [
        ("[1, 2]", ["csv"]),
        ("{'x': 1}", ["csv"]),
        ("map {'k': 1}", ["csv"]),
        ("INTERVAL 1 DAY", ["csv", "parquet"]),
        ("union_value(a := 1)", ["csv", "parquet"]),
        ("DATE '10000-01-01'", ["table", "json"]),
        ("DATE '0044-03-15 (BC)'", ["table", "json"]),
        ("TIMESTAMP 'infinity'", ["table", "json"]),
    ],
)
def test_a_column_that_a_format_cannot_write_is_named_with_what_to_do(sql, formats):
    answer = duckdb.sql(f"SELECT 1 AS one, {sql} AS odd").to_arrow_table()
    for output_format in formats:
        with pytest.raises(
            UserError, match=rf"column 'odd' \(.* cannot be written as {output_format}"
        ):
            rendered(answer, output_format)
    if "csv" not in formats:
        assert rendered(answer, "csv")
    as_text = duckdb.sql(f"SELECT CAST({sql} AS VARCHAR) AS odd").to_arrow_table()
    assert all(rendered(as_text, name) for name in ("table", "csv", "json", "parquet"))


def test_columns_of_one_name_are_refused_where_one_would_hide_the_other():
    answer = duckdb.sql("SELECT 1 AS a, 2 AS a").to_arrow_table()
    assert rendered(answer, "csv") == b'"a","a"\n1,2\n'
    with pytest.raises(UserError, match="column 'a' occurs 2 times, but JSON allows it once"):
        rendered(answer, "json")
