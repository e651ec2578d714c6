"""The tables and commands of the README and of docs/ are held equal to the code."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from lungopacity import errors
from lungopacity.cli import cli
from lungopacity.evaluation.metrics import classification_metrics
from lungopacity.evaluation.operating_points import decision_metrics
from lungopacity.models import OperatingPoint
from lungopacity.results.schema import (
    EXPLANATIONS_SCHEMA,
    METRICS_SCHEMA,
    evaluation_schema,
    predictions_schema,
)
from lungopacity.training.fit import HISTORY_SCHEMA
from lungopacity.training.trials import trials_table

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
REPORTS, RESULTS = PAGES["docs/reports.md"], PAGES["docs/results.md"]


def rows_of(title: str, text: str) -> list[list[str]]:
    table = text.split(f"| {title} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table]


def test_every_error_code_stands_in_the_table_with_its_own_sentence():
    (enum,) = [
        node
        for node in ast.parse(inspect.getsource(errors)).body
        if isinstance(node, ast.ClassDef) and node.name == "ErrorCode"
    ]
    sentences = [
        node.value.value
        for node in enum.body[1:]
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    expected = [
        [f"`{code.value}`", text] for code, text in zip(errors.ErrorCode, sentences, strict=True)
    ]
    assert rows_of("error code", RESULTS) == expected


def test_every_column_stands_in_the_table():
    told = [name for row in rows_of("column", RESULTS) for name in re.findall(r"`([^`]+)`", row[0])]
    columns = [
        re.sub("_Normal$", "_<class>", name)
        for name in predictions_schema(["Normal", "Lung_Opacity"]).names
        if not name.endswith("Lung_Opacity")
    ]
    assert told == columns


@pytest.mark.parametrize(
    ("title", "schema"),
    [
        ("### `metrics.parquet`", METRICS_SCHEMA),
        ("### `predictions.parquet`", evaluation_schema(["Normal", "Lung_Opacity"])),
        ("### `explain.parquet`", EXPLANATIONS_SCHEMA),
        ("### `history.parquet`", HISTORY_SCHEMA),
        ("### `trials.parquet`", trials_table([], {}).schema),
    ],
)
def test_every_column_of_a_report_is_told_with_its_type(title, schema):
    section = REPORTS.split(title)[1].split("\n#")[0]
    told = {
        name: row[1]
        for row in rows_of("column | type", section)
        for name in re.findall(r"`([^`]+)`", row[0])
    }
    kinds = {"float": "float32", "double": "float64"}
    for field in schema:
        name = re.sub("_(Normal|Lung_Opacity)$", "_<class>", field.name)
        assert told.get(name) == kinds.get(str(field.type), str(field.type)), name


def test_every_metric_of_a_report_is_told():
    labels, p = np.array([0, 1]), np.array([[0.9, 0.1], [0.2, 0.8]])
    metrics = [
        *classification_metrics(labels, p, ["a", "b"], positive="b"),
        *decision_metrics(p[:, 1], labels == 1, {"band": OperatingPoint(0.5, 0.3)}),
    ]
    told = {name for row in rows_of("metric", REPORTS) for name in re.findall("`([^`]+)`", row[0])}
    assert {metric.metric for metric in metrics} <= told


SHELL_BLOCKS = [
    text
    for page in PAGES.values()
    for kind, text in re.findall(r"```(\w*)\n(.*?)```", page, re.DOTALL)
    if not kind
]


@pytest.mark.parametrize("block", SHELL_BLOCKS)
def test_every_command_takes_the_options_that_are_shown(block):
    text = block.replace("\\\n", " ")
    for line in re.split(r"\n(?=\S)", text):
        name = re.search(r"(?:^lungopacity|jobs/)\s*(\w+)", line)
        if name is None or name[1] not in cli.commands:
            continue
        words = shlex.split(line[name.end() :].removeprefix(".py"), comments=True)
        cli.commands[name[1]].make_context(name[1], words)
