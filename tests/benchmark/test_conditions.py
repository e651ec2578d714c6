import json
import py_compile
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from lungopacity.benchmark.conditions import Conditions, _is_compiled
from lungopacity.benchmark.plan import PlanCost
from lungopacity.cli import main
from lungopacity.errors import NOTICE


@pytest.fixture
def measured(monkeypatch):
    def plan_costs(*_, **__):
        return [PlanCost(100, 99, 1, 0.5, 50.0)]

    monkeypatch.setattr("lungopacity.benchmark.plan.plan_costs", plan_costs)
    monkeypatch.setattr("lungopacity.benchmark.conditions.gpus_here", lambda: 0)


@pytest.mark.usefixtures("measured")
def test_figures_in_json_tell_how_they_were_measured(capfd):
    assert main(["benchmark", "plan", "--keys", "100", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["command"] == "lungopacity benchmark plan --keys 100 --json"
    age = datetime.now(UTC) - datetime.fromisoformat(found["measured_at"])
    assert timedelta() <= age < timedelta(minutes=1)
    assert found["cpu"]
    assert found["cores"] >= 1
    assert {"python", "torch", "ray", "pyarrow", "ncnn"} <= set(found["versions"])
    assert (found["gpus"], found["notice"], found["notes"]) == ([], NOTICE, [])
    assert [row["keys"] for row in found["figures"]] == [100]


@pytest.mark.usefixtures("measured")
def test_they_stand_above_the_table_too(capfd):
    assert main(["benchmark", "plan", "--keys", "100"]) == 0
    head, _, table = capfd.readouterr().out.partition("\n\n")
    command, machine, versions, *_, notice = head.splitlines()
    assert command == "lungopacity benchmark plan --keys 100"
    assert machine.endswith(("core, no GPU", "cores, no GPU"))
    assert "torch 2." in versions
    assert notice == NOTICE
    assert len(table.splitlines()) == 2


def test_packages_without_bytecode_are_told_of_for_starts_are_slow(tmp_path, monkeypatch):
    (tmp_path / "slowpackage.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert not _is_compiled("slowpackage")
    py_compile.compile(str(tmp_path / "slowpackage.py"))
    assert _is_compiled("slowpackage")
    conditions = Conditions("x", "2026-01-01T00:00:00+00:00", "CPU", 1, (), {})
    assert "bytecode" not in conditions.heading()
    assert "compileall" in replace(conditions, compiled=False).heading()


def test_gpus_are_named():
    conditions = Conditions("x", "2026-01-01T00:00:00+00:00", "CPU", 1, ("H100", "H100"), {})
    assert "CPU, 1 core, H100, H100" in conditions.heading()
