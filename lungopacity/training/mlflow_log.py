"""A training run on a tracking server of MLflow."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from lungopacity.errors import NOTICE, UserError
from lungopacity.training.run_log import RunLog, as_user_error

EXPERIMENT = "lungopacity"
"""MLflow's experiment, unless the variable MLFLOW_EXPERIMENT_NAME names another."""

_EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"
_FOLDER_VARIABLE = "MLFLOW_ALLOW_FILE_STORE"
_RUN_TAG = "lungopacity.run"
_OUTPUT_TAG = "model_folder"
# MLflow reads these when it is imported. By default it sends usage data to its authors, and tries
# for minutes to reach a server that does not answer.
_MLFLOW_VARIABLES = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class MlflowLog(RunLog):
    """A run on an MLflow server, found again by its tags."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        self.place = f"--mlflow {_without_password(uri)}"
        for name, value in _MLFLOW_VARIABLES.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow import MlflowClient
        except ModuleNotFoundError as error:
            raise UserError(
                "--mlflow: MLflow is not installed where the training is started; pip install "
                "'lungopacity[mlflow]'"
            ) from error
        name = os.environ.get(_EXPERIMENT_VARIABLE, EXPERIMENT)
        with as_user_error(self.place), _with_advice(self.place):
            self._client = MlflowClient(uri)
            found = self._client.get_experiment_by_name(name)
            self._experiment = (
                self._client.create_experiment(name) if found is None else found.experiment_id
            )
        self._run: str | None = None
        self._figures: set[tuple[str, int]] = set()
        """Names and epochs of the figures that a resumed run has already."""

    def start(self, run: str, settings: Mapping[str, bool | float | str], output: str) -> None:
        from mlflow.entities import Param

        # Finds a run even if it was killed before its first checkpoint, but only of this output.
        unfinished = f"tags.`{_RUN_TAG}` = '{run}' and attributes.status != 'FINISHED'"
        found = [
            item
            for item in self._client.search_runs([self._experiment], unfinished)
            if item.data.tags.get(_OUTPUT_TAG) == output
        ]
        if found:
            self._run = str(found[0].info.run_id)
            self._client.update_run(self._run, status="RUNNING")
            # A run that was killed while it wrote an epoch has only some of the epoch's figures.
            self._figures = {
                (name, metric.step)
                for name in found[0].data.metrics
                for metric in self._client.get_metric_history(self._run, name)
            }
            self.written = {step for name, step in self._figures if name == "validation_loss"}
            return
        tags = {_RUN_TAG: run, _OUTPUT_TAG: output, "mlflow.note.content": NOTICE}
        made = self._client.create_run(
            self._experiment, tags=tags, run_name=f"{settings['model']} {run}"
        )
        self._run = str(made.info.run_id)
        parameters = [Param(name, str(value)) for name, value in settings.items()]
        self._client.log_batch(self._run, params=parameters)

    def write(self, row: Mapping[str, Any]) -> None:
        values = {name: value for name, value in row.items() if name != "epoch"}
        # Written last: an epoch that has it is complete.
        values["validation_loss"] = values.pop("validation_loss")
        self._metrics(values, row["epoch"])

    def finish(self, metrics: Mapping[str, float], facts: Mapping[str, str], epoch: int) -> None:
        self._metrics(metrics, epoch)
        for name, text in facts.items():
            self._client.set_tag(self._run, name, text)
        self._client.set_terminated(self._run, "FINISHED")
        self._run = None

    def give_up(self) -> None:
        if self._run is not None:
            self._client.set_terminated(self._run, "FAILED")

    def _metrics(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(name, float(value), now, step)
            for name, value in values.items()
            if (name, step) not in self._figures
        ]
        self._client.log_batch(self._run, metrics=metrics)


@contextlib.contextmanager
def _with_advice(place: str) -> Iterator[None]:
    """Raises a `UserError` with what to do where this MLflow cannot keep runs there. MLflow's own
    errors give no advice, or advice for another installation than ours."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

    try:
        yield
    except UnsupportedModelRegistryStoreURIException as error:
        raise UserError(
            f"{place}: the MLflow client cannot keep runs there; give the http:// address of a "
            "tracking server or, for a database, pip install mlflow"
        ) from error
    except MlflowException as error:
        if _FOLDER_VARIABLE not in str(error):
            raise
        raise UserError(
            f"{place}: MLflow keeps runs in a folder only where {_FOLDER_VARIABLE}=true is set; "
            "set it, or give the http:// address of a tracking server"
        ) from error


def _without_password(uri: str) -> str:
    host = urlsplit(uri).netloc
    return uri.replace(host, host.rpartition("@")[2], 1) if "@" in host else uri
