"""The README's tables and commands are held equal to the code."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest

from lungopacity import errors
from lungopacity.cli import cli
from lungopacity.results.schema import predictions_schema

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def rows_of(title: str) -> list[list[str]]:
    table = README.split(f"| {title} |")[1].split("\n\n")[0].splitlines()[2:]
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
    assert rows_of("error code") == expected


def test_every_column_stands_in_the_table():
    told = [name for row in rows_of("column") for name in re.findall(r"`([^`]+)`", row[0])]
    columns = [
        re.sub("_Normal$", "_<class>", name)
        for name in predictions_schema(["Normal", "Lung_Opacity"]).names
        if not name.endswith("Lung_Opacity")
    ]
    assert told == columns


SHELL_BLOCKS = [
    text for kind, text in re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL) if not kind
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
