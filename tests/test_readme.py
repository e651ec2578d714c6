"""The tables, commands and links of the README and of docs/ are held equal to the code."""

import ast
import inspect
import json
import re
import shlex
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pytest

import lungopacity
from lungopacity import errors, observe
from lungopacity.cli import cli
from lungopacity.dataset.layouts import LAYOUTS
from lungopacity.evaluation.bootstrap import Resampling
from lungopacity.evaluation.drift import Sample, drift_metrics, shifts
from lungopacity.evaluation.measure import ScoredImages, measure
from lungopacity.evaluation.operating_points import STANDARD
from lungopacity.models import NETWORK_NAMES, OperatingPoint
from lungopacity.radiograph import ACCEPTABLE, DecodeLimits
from lungopacity.results.folder import STATUS
from lungopacity.results.schema import (
    EXPLANATIONS_SCHEMA,
    METRICS_SCHEMA,
    evaluation_schema,
    predictions_schema,
)
from lungopacity.screening.aggregate import run_metrics
from lungopacity.screening.nightly import _Status
from lungopacity.storage import open_store
from lungopacity.storage.lease import Lease
from lungopacity.training.fit import HISTORY_SCHEMA
from lungopacity.training.trials import trials_table
from tests.screening.test_aggregate import MIXED, SPEC, predictions

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README, REPORTS, RESULTS = (
    PAGES[name] for name in ("README.md", "docs/reports.md", "docs/results.md")
)
INPUTS, OPERATIONS = PAGES["docs/inputs.md"], PAGES["docs/operations.md"]
TRAINING, EVALUATION = PAGES["docs/training.md"], PAGES["docs/evaluation.md"]


def rows_of(title: str, text: str) -> list[list[str]]:
    (table,) = [part.split("\n\n")[0].splitlines()[2:] for part in text.split(f"| {title} |")[1:]]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table]


def words_in(cell: str) -> list[str]:
    """What stands there as code."""
    return re.findall(r"`([^`]+)`", cell)


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


def test_which_error_codes_are_no_failures_is_told():
    told = RESULTS.split("exit code at 0: ")[1].split(".")[0]
    assert set(words_in(told)) == errors.REJECTING


def types_by_column(schema: pa.Schema) -> dict[str, str]:
    """As the tables of columns tell them."""
    kinds = {"float": "float32", "double": "float64"}
    return {
        re.sub("_(Normal|Lung_Opacity)$", "_<class>", field.name): kinds.get(
            str(field.type), str(field.type)
        )
        for field in schema
    }


def test_every_column_stands_in_the_table_with_its_type():
    schema = predictions_schema(["Normal", "Lung_Opacity"])
    rows = rows_of("column | type", RESULTS)
    told = {name: row[1] for row in rows for name in words_in(row[0])}
    assert list(told.items()) == list(types_by_column(schema).items())
    never_null = RESULTS.split("Never null: ")[1].split(".")[0]
    assert words_in(never_null) == [field.name for field in schema if not field.nullable]


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
    told = {name: row[1] for row in rows_of("column | type", section) for name in words_in(row[0])}
    for name, kind in types_by_column(schema).items():
        assert told.get(name) == kind, name


def test_every_metric_of_a_report_is_told():
    labels, p = np.array([0, 1]), np.array([[0.9, 0.1], [0.2, 0.8]])
    images = ScoredImages(labels, p, ("a", "b"), "b", p, {"band": OperatingPoint(0.5, 0.3)})
    metrics = measure(images, {}, Resampling.of(["a", "b"], 2))
    told = {name for row in rows_of("metric", REPORTS) for name in words_in(row[0])}
    assert {metric.metric for metric in metrics} <= told


def test_every_metric_of_a_screened_run_is_told():
    rows = predictions(*(dict(row) for row in MIXED))
    sample = Sample.of(rows, "p_Lung_Opacity", failed_again=0)
    metrics = run_metrics(rows, SPEC, seconds=1.0)
    metrics += drift_metrics(shifts(sample, sample), sample, sample)
    told = [name for row in rows_of("metric of a run", REPORTS) for name in words_in(row[0])]
    assert told == list(dict.fromkeys(metric.metric for metric in metrics))


def test_every_command_stands_in_the_table():
    assert sorted(
        words_in(row[0])[0] for row in rows_of("command | what it does | more", README)
    ) == sorted(cli.commands)


def test_every_function_is_told():
    told = words_in(RESULTS.split("## From Python")[1].split("```")[0])
    assert told == [name for name in lungopacity.__all__ if name.islower()]


def test_what_is_tried_again_is_told():
    told = [set(words_in(row[0])) for row in rows_of("error codes", OPERATIONS)]
    assert told == [set(errors.OF_STORAGE), set(errors.OF_VERSION), set()]


def test_every_field_of_a_nights_status_is_told(tmp_path):
    store = open_store(str(tmp_path))
    with Lease(store, "nightly", "a test") as lease:
        _Status(store, "archive", lease)
    fields = json.loads(store.read(STATUS)).keys() - {"notice"}
    told = [name for row in rows_of("field", OPERATIONS) for name in words_in(row[0])]
    assert sorted(told) == sorted(fields)


def test_every_figure_of_prometheus_is_told():
    counters = {"objects_planned": "", "objects_waiting": "", "images_done": ""}
    expected = [
        [f"`ray_lungopacity_{name}{counters.get(name, '_total')}`", what]
        for name, what in observe.NAMES.items()
    ]
    assert rows_of("figure", PAGES["docs/cluster.md"]) == expected


def test_every_layout_is_told_with_its_tables():
    told = {
        words_in(name)[0]: {word.split("=")[0] for word in words_in(tables) if "=" in word}
        for name, tables, _ in rows_of("`--layout`", INPUTS)
    }
    assert told == {name: set(layout.tables) for name, layout in LAYOUTS.items()}


def test_every_rule_of_reading_is_told():
    assert {words_in(row[1])[0] for row in rows_of("the header says", INPUTS)} == ACCEPTABLE
    limits = DecodeLimits()
    told = [row[0] for row in rows_of("limit", INPUTS)]
    assert told == [
        f"{limits.max_megapixels:g} megapixels",
        f"{limits.max_size_bytes >> 20} MiB",
        f"{limits.max_frames:,} frames",
        f"{limits.max_scans} scans",
        f"{limits.max_seconds:g} s",
        f"{limits.max_memory_bytes >> 30} GiB",
    ]


def test_every_network_and_operating_point_is_told():
    networks = TRAINING.split("lists the networks:")[1].split("\n\nAll ")[0]
    assert [name for name in words_in(networks) if ":" not in name] == list(NETWORK_NAMES)
    told = [words_in(row[0])[0] for row in rows_of("name", EVALUATION)]
    assert told == list(STANDARD)


SHELL_BLOCKS = [
    text
    for page in PAGES.values()
    for kind, text in re.findall(r"```(\w*)\n(.*?)```", page, re.DOTALL)
    if not kind
]
PROSE = {name: re.sub(r"```.*?```", "", page, flags=re.DOTALL) for name, page in PAGES.items()}
MEASURED = [words_in(row[2])[0] for row in rows_of("what | figure | command", README)]


@pytest.mark.parametrize("block", [*SHELL_BLOCKS, *MEASURED])
def test_every_command_takes_the_options_that_are_shown(block):
    text = block.replace("\\\n", " ")
    for line in re.split(r"\n(?=\S)", text):
        name = re.search(r"(?:^lungopacity|jobs/)\s*(\w+)", line)
        if name is None or name[1] not in cli.commands:
            continue
        words = shlex.split(line[name.end() :].removeprefix(".py"), comments=True)
        command, called = cli.commands[name[1]], name[1]
        if isinstance(command, click.Group):
            called, *words = words
            command = command.commands[called]
        command.make_context(called, words)


def test_every_option_that_is_named_with_its_command_is_there():
    named = [
        (cli.commands[found[1]], found[2])
        for page in PROSE.values()
        for text in words_in(page)
        if (found := re.match(r"(?:lungopacity )?(\w+) (.*--.*)", " ".join(text.split())))
        and found[1] in cli.commands
    ]
    for command, text in named:
        below = command.commands.values() if isinstance(command, click.Group) else [command]
        options = [option for one in below for option in one.params]
        known = {name for option in options for name in (*option.opts, *option.secondary_opts)}
        assert set(re.findall(r"--[a-z][a-z-]*", text)) <= known, f"{command.name} {text}"
    assert named


def test_what_is_asked_of_make_is_there():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES.values():
        assert set(re.findall(r"^make (\w+)", page, re.MULTILINE)) <= targets
        assert set(re.findall(r"`[^`]*\bmake (\w+)[^`]*`", page)) <= targets
        for path in re.findall(r"TESTS=([\w/.]+)", page):
            assert (ROOT / path).exists(), path


def anchors_of(page: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", PROSE[name]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / name).parent.joinpath(path).resolve() if path else ROOT / name
        assert found.is_file(), target
        if anchor:
            assert anchor in anchors_of(PAGES[str(found.relative_to(ROOT))]), target


def test_every_page_is_in_the_table_of_pages():
    told = [words for row in rows_of("page", README) for words in re.findall(r"\((.+)\)", row[0])]
    assert sorted(told) == sorted(PAGES.keys() - {"README.md"})


def test_every_page_that_the_code_names_is_there():
    files = [ROOT / "Makefile"]
    kinds = (".json", ".py", ".sh", ".yaml")
    for folder in ("cluster", "jobs", "lungopacity", "tests"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    named = {name for path in files for name in re.findall(r"\bdocs/\w+\.md", path.read_text())}
    assert named <= PAGES.keys()
    assert named
