"""TensorBoard's and MLflow's own readers, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lungopacity.storage import open_store
from lungopacity.training.mlflow_log import EXPERIMENT


def tensorboard_events(uri: str, copy: Path) -> EventAccumulator:
    """The events of a run's folder, which may be in S3."""
    copy.mkdir()
    for item in open_store(uri).list():
        (copy / item.key).write_bytes(open_store(uri).read(item.key))
    events = EventAccumulator(str(copy))
    events.Reload()
    return events


def scalars(events: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events.Scalars(tag)}


def mlflow_run(uri: str, run: str) -> tuple[Any, dict[str, list[tuple[int, float]]]]:
    """The one run of that name, and each of its metrics as (step, value) in the order written."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`lungopacity.run` = '{run}'")
    histories = {
        name: [(one.step, one.value) for one in client.get_metric_history(found.info.run_id, name)]
        for name in found.data.metrics
    }
    return found, histories
