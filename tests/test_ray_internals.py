"""What is reached for inside Ray: each name is there in the pinned release, is put back, and may be
gone in another one."""

from __future__ import annotations

import sys

import pytest

from lungopacity.runtime import ray_internals
from lungopacity.runtime.session import RAY, RaySession, lean_training


def test_each_name_is_there_in_this_release():
    from ray._private import internal_api
    from ray._raylet import AuthenticationTokenLoader

    with ray_internals.without_idle_servers() as found:
        assert found == [
            "start_monitor",
            "start_log_monitor",
            "start_api_server",
            "get_node",
            "start_ray_process",
            "get_dashboard_dependency_error",
        ]
    with ray_internals.without_idle_actors() as found:
        assert found == [
            "register_dataset_to_stats_actor",
            "update_execution_metrics",
            "update_iteration_metrics",
            "create_cluster_autoscaler",
        ]
    with ray_internals.without_signal_handlers() as found:
        assert found == ["set_sigterm_handler"]
    with ray_internals.without_idle_training_actors() as found:
        assert found == [
            "TrainController",
            "get_env_vars_to_propagate",
            "PlacementGroupCleanerCallback",
            "DatasetsCallback",
            "create_scaling_policy",
        ]
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    assert hasattr(TrainController.worker_group_cls, "_get_worker_runtime_env")
    assert set(ray_internals._REQUESTS) <= set(dir(FixedScalingPolicy))
    assert {"get_memory_info_reply", "get_state_from_address"} <= set(vars(internal_api))
    assert hasattr(AuthenticationTokenLoader.instance(), "reset_cache")


@pytest.mark.parametrize(
    ("block", "module"),
    [
        ("without_idle_servers", "ray._private.node"),
        ("without_signal_handlers", "ray._private"),
        ("without_idle_training_actors", "ray.train.v2.api"),
        ("without_idle_actors", "ray.data._internal.stats"),
        ("without_idle_actors", "ray.data._internal.execution.interfaces"),
    ],
)
def test_a_release_that_has_them_elsewhere_goes_without(monkeypatch, block, module):
    monkeypatch.setitem(sys.modules, module, None)
    with getattr(ray_internals, block)() as found:
        pass
    assert len(found) < 4
    monkeypatch.setitem(sys.modules, "ray._private.internal_api", None)
    assert ray_internals.bytes_moved() is None


def test_an_unknown_release_starts_its_own_agents(monkeypatch):
    monkeypatch.setattr("ray.__version__", "2.61.0")
    with ray_internals.without_idle_servers() as found:
        assert found == ["start_monitor", "start_log_monitor", "start_api_server", "get_node"]


def test_training_in_a_cluster_keeps_what_watches_over_it(monkeypatch):
    from ray.train.v2.api import data_parallel_trainer

    names = "PlacementGroupCleanerCallback", "TrainController", "get_env_vars_to_propagate"

    def in_use() -> list[object]:
        return [getattr(data_parallel_trainer, name) for name in names]

    before = in_use()
    monkeypatch.setattr(RAY, "is_private", False)
    with lean_training():
        assert in_use() == before
    monkeypatch.setattr(RAY, "is_private", True)
    with lean_training():
        assert not set(in_use()) & set(before)
    assert in_use() == before


def test_ray_data_is_as_it_was_after_a_ray_of_our_own(monkeypatch):
    from ray.data._internal.execution import streaming_executor
    from ray.data._internal.stats import _StatsManager

    def as_ray_has_them() -> list[object]:
        register = vars(_StatsManager)["register_dataset_to_stats_actor"]
        return [register, streaming_executor.create_cluster_autoscaler]

    before, session = as_ray_has_them(), RaySession()
    session.start_no_idle_actors()  # a cluster of others has a dashboard
    assert as_ray_has_them() == before
    session.is_private = True
    for _ in range(2):
        session.start_no_idle_actors()
    assert not set(as_ray_has_them()) & set(before)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    session._end()
    assert as_ray_has_them() == before


def test_tasks_wait_at_the_raylet_and_actors_get_the_cpus_there_are(monkeypatch):
    from ray.data._internal.execution import streaming_executor
    from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

    actors = object.__new__(ActorPoolMapOperator)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 3.0, "GPU": 1.0})
    with ray_internals.without_idle_actors():
        told = [
            streaming_executor.create_cluster_autoscaler(stages, None, execution_id="x")
            for stages in ([object()], [object(), actors])
        ]
    resources = [one.get_total_resources() for one in told]
    assert [(one.cpu, one.gpu) for one in resources] == [(6, 1), (3, 1)]
