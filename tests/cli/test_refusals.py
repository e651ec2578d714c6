"""What the command line refuses before any work, and what it says of a defect."""

import json
import os
import re
import subprocess
import sys
import warnings

import click
import pytest

from lungopacity.cli import cli
from lungopacity.errors import ErrorCode, ImageError, Stage, UserError
from tests.cli.running import run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "--output", ""], "--output is empty; give it a value, or leave it out"),
        (["screen", "--run-id", ""], "--run-id is empty"),
        (["screen", "--reject-quality", ""], "--reject-quality is empty; say none"),
        (["train", "--images", "a", "--images", ""], "--images is empty"),
        (["benchmark", "score", "--networks", ""], "--networks is empty"),
        (["query", "--results", "r", ""], "sql is empty"),
        (["screen", "--limit", "1" + "0" * 20], "'--limit': 100000000000000000000 is more than"),
        (["explain", "--limit", "1" + "0" * 20], "is more than 1000000000000"),
        (["nightly", "--max-images", "1" + "0" * 20], "is more than 1000000000000"),
        (["screen", "--limit", "many"], "'many' is not a valid integer"),
        (["screen", "--grows-to", "CPU=inf"], "'CPU=inf': give numbers of 0 or more"),
        (["screen", "--grows-to", "CPU=nan"], "'CPU=nan': give numbers of 0 or more"),
        (["screen", "--grows-to", "GPU=-1"], "'GPU=-1': give numbers of 0 or more"),
    ],
)
def test_a_value_that_is_none_is_refused(capfd, arguments, message):
    code, out, err = run(capfd, *arguments)
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.lower().startswith("error: ")]
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["screen", "--images", "films"], "--archive"),
        (["nightly", "--images", "films"], "--archive"),
        (["train", "--archive", "films"], "--images"),
        (["evaluate", "--archive", "films"], "--images"),
        (["runs", "--output", "results"], "--results"),
        (["screen", "--results", "results"], "--output"),
        (["screen", "--labl", "films"], "--labels"),
    ],
)
def test_an_option_that_another_command_names_otherwise_is_named(capfd, arguments, meant):
    code, _, err = run(capfd, *arguments)
    assert code == 2
    assert err.endswith(f"No such option '{arguments[1]}'. Did you mean '{meant}'?\n")


def test_an_option_of_all_commands_is_told_its_place(capfd):
    code, _, err = run(capfd, "nightly", "--log-format", "json")
    assert code == 2
    assert err.endswith("'--log-format' here. Give it before the command's name.\n")


@pytest.mark.parametrize("group", [[], ["benchmark"]])
def test_a_list_of_commands_has_room_for_what_each_does(capfd, group):
    _, out, _ = run(capfd, *group, "--help")
    listed = out.split("Commands:")[1]
    assert "  train " in listed
    assert "..." not in listed


def test_a_limit_that_no_user_meets_is_not_in_the_help(capfd):
    _, out, _ = run(capfd, "screen", "--help")
    assert re.search(r"--limit INTEGER +Screen only", out)
    assert "x<=" not in out


def test_what_is_required_is_not_to_be_left_out(capfd):
    assert run(capfd, "screen", "--output", "")[2] == "error: --output is empty; give it a value\n"


def test_the_default_rules_are_those_of_no_word():
    accept, reject = (
        next(option for option in cli.commands["screen"].params if option.name == name)
        for name in ("accept", "reject_quality")
    )
    context = click.Context(cli.commands["screen"])
    assert accept.process_value(context, accept.get_default(context)) == []
    assert reject.process_value(context, reject.get_default(context)) is None
    assert reject.process_value(context, "none") == []


def test_a_module_that_a_node_lacks_is_told_with_the_mend(monkeypatch, capfd):
    def broken(uri: str) -> None:
        try:
            raise ModuleNotFoundError("No module named 'gdcm'", name="gdcm")
        except ModuleNotFoundError as error:
            raise RuntimeError("a task failed") from error

    monkeypatch.setattr("lungopacity.results.query.open_store", broken)
    code, _, err = run(capfd, "runs", "--results", "x")
    assert code == 2
    assert "has no module 'gdcm'; install requirements.lock there" in err


def test_a_storage_that_fails_is_no_defect(monkeypatch, capfd):
    def broken(uri: str) -> None:
        raise ImageError(ErrorCode.TIMEOUT, Stage.FETCH, "no answer in time")

    monkeypatch.setattr("lungopacity.results.query.open_store", broken)
    code, _, err = run(capfd, "runs", "--results", "x")
    assert (code, err) == (2, "error: the storage failed: no answer in time; try again\n")


def test_for_collectors_the_last_line_and_warnings_are_objects_too(monkeypatch, capfd):
    def broken(uri: str) -> None:
        warnings.warn("odd\nfile", stacklevel=1)
        raise UserError("nothing there; look elsewhere")

    monkeypatch.setattr("lungopacity.results.query.open_store", broken)
    monkeypatch.setenv("LUNGOPACITY_LOG_FORMAT", "json")
    for arguments, said in (
        (["runs", "--results", "x"], ["odd\nfile", "nothing there; look elsewhere"]),
        (["runs"], ["Missing option '--results'"]),
        (["run"], ["No such command 'run'"]),
    ):
        code, out, err = run(capfd, *arguments)
        assert (code, out) == (2, "")
        lines = [json.loads(line) for line in err.splitlines()]
        assert [line["level"] for line in lines] == ["WARNING"] * (len(said) - 1) + ["ERROR"]
        assert all(part in line["message"] for part, line in zip(said, lines, strict=True))
        assert not lines[-1]["message"].startswith("error:")


def test_a_variable_that_is_wrong_is_named(monkeypatch, capfd):
    monkeypatch.setenv("LUNGOPACITY_LOG_FORMAT", "xml")
    code, _, err = run(capfd, "runs", "--results", "x")
    assert code == 2
    assert "'--log-format' (env var: 'LUNGOPACITY_LOG_FORMAT'): 'xml' is not one of" in err


def test_for_people_a_warning_is_a_line_without_escapes(monkeypatch, capfd):
    def broken(uri: str) -> None:
        warnings.warn("odd\x1b[2J\nfile", stacklevel=1)
        raise UserError("nothing there")

    monkeypatch.setattr("lungopacity.results.query.open_store", broken)
    _, _, err = run(capfd, "runs", "--results", "x")
    assert err.splitlines()[0].endswith(r": UserWarning: odd\x1b[2J\nfile")
    assert err.splitlines()[1:] == ["error: nothing there"]


def test_a_defect_of_our_own_names_itself_and_how_to_report_it(monkeypatch, capfd):
    def broken(uri: str) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("lungopacity.results.query.open_store", broken)
    code, _, err = run(capfd, "runs", "--results", "x")
    assert code == 2
    assert "unforeseen ZeroDivisionError: division by zero" in err
    assert "Traceback" not in err
    monkeypatch.setenv("LUNGOPACITY_DEBUG", "1")
    code, _, err = run(capfd, "runs", "--results", "x")
    assert code == 2  # not Python's 1, of a job that is done
    assert 'raise ZeroDivisionError("division by zero")' in err
    assert err.splitlines()[-1].startswith("error: unforeseen ZeroDivisionError")


def test_a_command_that_ray_ends_does_not_pass_for_one_that_is_done(monkeypatch, capfd):
    """1 is the code of a job that is done, with images that could not be read."""

    def ended(uri: str) -> None:
        raise SystemExit(1)

    monkeypatch.setattr("lungopacity.results.query.open_store", ended)
    code, _, err = run(capfd, "runs", "--results", "x")
    assert code == 2
    assert "error: Ray ended this command (exit code 1); try again" in err


@pytest.mark.parametrize("arguments", [["models", "classical-cnn"], ["--help"]])
def test_a_command_whose_output_nobody_reads_to_its_end_says_nothing(arguments):
    """As with `| head`."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "lungopacity.cli", *arguments]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("arguments", [["models", "classical-cnn"], ["--help"]])
def test_a_full_disk_behind_the_output_is_no_defect(arguments):
    command = [sys.executable, "-m", "lungopacity.cli", *arguments]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: no space is left: where the output or")


def test_a_defect_in_a_worker_is_told_by_what_was_raised_there(monkeypatch, capfd):
    from ray.exceptions import RayTaskError

    def broken(uri: str) -> None:
        raised = ValueError("ours\nFailed to apply UDF transform\nTo change retry attempts, …")
        raise RayTaskError("f", f"a traceback\n{raised}", raised)

    monkeypatch.setattr("lungopacity.results.query.open_store", broken)
    code, _, err = run(capfd, "runs", "--results", "x")
    assert code == 2
    assert "unforeseen ValueError: ours (a defect" in err
