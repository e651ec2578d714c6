import json

import pytest

from lungopacity.benchmark.publish import publish_costs
from lungopacity.cli import main
from lungopacity.errors import UserError


def test_a_run_of_each_size_is_published_and_its_cost_told(capfd):
    assert main(["benchmark", "publish", "--keys", "1000,20000", "--json"]) == 0
    small, large = json.loads(capfd.readouterr().out)["figures"]
    assert (small["rows"], small["part_files"]) == (1000, 2)
    assert (large["rows"], large["part_files"]) == (20_000, 40)
    assert 0 < large["collect_seconds"] < large["seconds"] < 60
    assert 0.01 < small["published_mib"] < large["published_mib"]
    assert 50 < large["peak_mib"] < 2048


def test_sizes_that_are_none_are_refused():
    with pytest.raises(UserError, match="--keys must be at least 100"):
        publish_costs([1])
