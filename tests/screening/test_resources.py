"""What the job asks of a cluster, compared with what it has or may grow to before an actor starts.

Each cluster is a real Ray of its own: GPUs that Ray is told of need not exist to be counted.
"""

from __future__ import annotations

import json
import subprocess
import sys

from lungopacity.cli import main
from lungopacity.runtime import may_grow
from lungopacity.screening.resources import batch_size_for

SCRIPT = """
import json, logging, sys
from dataclasses import asdict
import ray
from lungopacity.errors import UserError
from lungopacity.runtime import grows_to, resolve_gpu
from lungopacity.screening.resources import ScoringResources
told = json.loads(sys.argv[1])
ray.init(address="local", num_cpus=told["cpus"], num_gpus=told["gpus"], include_dashboard=False,
         log_to_driver=False, logging_level=logging.ERROR)
for case in told["cases"]:
    with grows_to(case.pop("grows", {})):
        try:
            use_gpu = resolve_gpu(case.pop("use_gpu", None))
            found = ScoringResources.of_cluster(use_gpu, **case)
            print(json.dumps({**asdict(found), "devices": found.devices()}))
        except UserError as error:
            print(json.dumps({"error": str(error)}))
"""


def asked(cpus: int, gpus: int, *cases: dict) -> list[dict]:
    told = {"cpus": cpus, "gpus": gpus, "cases": cases}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(told)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_cluster_of_cpus_alone_keeps_one_to_read():
    fits, two, many, gpu = asked(
        4, 0, {}, {"model_actors": 2}, {"model_actors": 4}, {"use_gpu": True}
    )
    assert (fits["max_actors"], fits["actor_cpus"], fits["actor_gpus"]) == (3, 1.0, 0.0)
    assert (two["first_actors"], two["max_actors"]) == (1, 2)
    assert (fits["apart"], two["apart"]) == (False, True)
    assert many["error"].startswith("screening needs 5 CPUs, the Ray cluster has 4; use fewer")
    assert gpu["error"].startswith("screening needs 1 GPU, the Ray cluster has 0; use --no-gpu")


def test_one_gpu_or_many_whole_or_in_shares():
    whole, shared, thirds, six, seven, cpu = asked(
        4,
        2,
        {},
        {"gpus_per_actor": 0.5},
        {"gpus_per_actor": 1 / 3},
        {"gpus_per_actor": 1 / 3, "model_actors": 6},
        {"gpus_per_actor": 0.6, "model_actors": 3},
        {"use_gpu": False},
    )
    assert (whole["max_actors"], whole["actor_cpus"], whole["actor_gpus"]) == (2, 0.0, 1.0)
    assert (shared["max_actors"], shared["actor_gpus"]) == (4, 0.5)
    assert [case["devices"] for case in (whole, cpu)] == [["gpu"], ["cpu"]]
    # One for each GPU that is there, at once: Ray adds one at a time.
    assert [case["first_actors"] for case in (whole, shared, six, cpu)] == [2, 4, 6, 1]
    assert thirds["max_actors"] == six["max_actors"] == 6
    assert "needs 3 GPUs, the Ray cluster has 2;" in seven["error"]  # 0.6 and 0.6 share none
    assert (cpu["max_actors"], cpu["actor_gpus"]) == (3, 0.0)
    assert [case["apart"] for case in (whole, shared, six, cpu)] == [True, True, True, False]


def test_what_the_cluster_may_grow_to_counts_and_more_is_refused():
    grows = {"CPU": 14, "GPU": 3}
    fits, three, four, small = asked(
        0,
        0,
        {"grows": grows},
        {"grows": grows, "model_actors": 3},
        {"grows": grows, "model_actors": 4},
        {"grows": {"CPU": 2}, "use_gpu": False},
    )
    assert (fits["max_actors"], fits["actor_gpus"]) == (3, 1.0)
    assert three["max_actors"] == 3
    assert fits["first_actors"] == three["first_actors"] == 1
    assert "needs 4 GPUs, the Ray cluster has 0 and may grow to 3;" in four["error"]
    assert small["threads"] == 1  # torch refuses 0, which is what the head alone has


def test_what_the_cluster_may_grow_to_is_told_as_an_option(capfd):
    arguments = ["evaluate", "--model", "m", "--images", "i", "--labels", "l", "--output", "o"]
    for wrong in ("GPU", "GPU=many", "TPU=1", "4"):
        assert main([*arguments, "--grows-to", wrong]) == 2
        assert "is not of the form CPU=80,GPU=4" in capfd.readouterr().err
    assert main([*arguments, "--grows-to", "cpu=80,GPU=4"]) == 2
    assert "is not a model folder" in capfd.readouterr().err
    assert not may_grow()


def test_a_gpu_takes_larger_batches_unless_the_user_says_how_large():
    assert batch_size_for(use_gpu=True) > batch_size_for(use_gpu=False) > 1
