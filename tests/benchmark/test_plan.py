import json

import pytest

from lungopacity.benchmark.plan import plan_costs
from lungopacity.cli import main
from lungopacity.errors import UserError


def test_a_night_is_planned_over_each_size_and_its_cost_told(capfd):
    assert main(["benchmark", "plan", "--keys", "1000,20000", "--json"]) == 0
    small, large = json.loads(capfd.readouterr().out)["figures"]
    assert (small["keys"], small["history_rows"], small["planned"]) == (1000, 990, 10)
    assert (large["keys"], large["planned"]) == (20_000, 200)
    assert 0 < small["seconds"] < 30
    assert 50 < large["peak_mib"] < 2048


def test_a_first_night_is_planned_over_a_given_archive(tmp_path, capfd):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"a film")
    command = ["benchmark", "plan", "--images", str(tmp_path), "--json"]
    assert main(command) == 0
    (cost,) = json.loads(capfd.readouterr().out)["figures"]
    assert (cost["keys"], cost["history_rows"], cost["planned"]) == (3, 0, 3)
    assert main([*command, "--model", str(tmp_path / "none")]) == 2


def test_sizes_that_are_none_are_refused(capfd):
    with pytest.raises(UserError, match="--keys must be at least 100"):
        plan_costs([99])
    assert main(["benchmark", "plan", "--keys", "many"]) == 2
    assert "'many' is not a list of whole numbers" in capfd.readouterr().err
