"""A training run whose last worker pauses after its second epoch until it is killed, so that a test
that kills it at that epoch does so before the last one, even on a busy machine."""

from __future__ import annotations

import os
import resource
import threading
from typing import Any

import ray
import ray.train
import torch

from lungopacity.runtime.resources import cpus_here
from lungopacity.training.loop import train_loop
from lungopacity.training.torch_backend import GLOO_INTERFACE, interface_of


def resting_loop(config: dict[str, Any]) -> dict[str, Any]:
    """`train_loop`, for Ray Train; after a restart, it runs to the end."""
    context = ray.train.get_context()
    rests = context.get_world_rank() == context.get_world_size() - 1
    report = ray.train.report

    def reported(row: dict[str, Any], *rest: Any, **options: Any) -> None:
        report(row, *rest, **options)
        if rests and row["epoch"] == 2:
            threading.Event().wait()

    ray.train.report = reported
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    result = train_loop(config)
    assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0
    # The tests' Ray has an address of this machine.
    assert os.environ[GLOO_INTERFACE] == interface_of(ray.util.get_node_ip_address())
    # Of the CPUs that Ray has here, not all that the process sees.
    assert torch.get_num_threads() == max(1, cpus_here() // context.get_local_world_size())
    return result


def resting_loop_in_private_ray(config: dict[str, Any]) -> dict[str, Any]:
    """`resting_loop` in a Ray that was started for this job alone."""
    result = resting_loop(config)
    # It started fast, with the variables of Ray's own processes.
    assert ray.get_runtime_context().get_runtime_env_string() == "{}"
    assert os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "0"
    return result
