"""What tests share: a real S3 server, and a real Ray."""

from __future__ import annotations

import os
import resource
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local_s3 import LocalS3
from lungopacity import observe
from tests.fault_proxy import FaultProxy, fault_proxy

# Before anything imports ray: see lungopacity.runtime.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's workers have a niceness of 15 by default. Whatever else the machine does, such as the other
# test process, would get thirty times as much of a core, and the tests with Ray would wait.
os.environ.setdefault("RAY_worker_niceness", "0")
# Before anything imports torch. Several processes share the cores; with more threads, each layer of
# a small network would wait until the last of its threads has had its turn.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_BUCKET = "tests"
_SLOW = ("integration", "faults", "benchmark", "training")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the folders of long files first, so that no core is idle for minutes at the end."""
    items.sort(key=lambda item: item.path.parent.name not in _SLOW)


@pytest.fixture(autouse=True)
def _log_lines_for_people() -> Iterator[None]:
    """A test that asks for JSON log lines, whether it passes or not, leaves no later test with
    them."""
    yield
    if observe._as_json:
        observe.log_lines("text")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Undoes what the scorers of earlier tests have set: each takes as many threads as there are
    CPUs."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    """One server for the whole run. Its AWS variables are set, so that Ray's processes inherit
    them."""
    with LocalS3(tmp_path_factory.mktemp("s3")) as server, server.as_environment():
        server.create_bucket(_BUCKET)
        yield server


@pytest.fixture
def s3_uri(s3_server: LocalS3) -> str:
    """A prefix of this test's own."""
    return f"s3://{_BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def only_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit` ends with its last epoch: it neither scores all films once more nor compiles, which
    takes longer than a short training."""
    monkeypatch.setattr("lungopacity.training.fit._completed", lambda model, *_: model)


@pytest.fixture
def proxy(s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy in front of the server, for this process alone, whose waits are short."""
    monkeypatch.setattr("lungopacity.storage.s3._BACKOFF_S", 0.005)
    monkeypatch.setattr("lungopacity.storage.outage._PAUSE_S", 0.2)
    with fault_proxy(s3_server.endpoint_url) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


@pytest.fixture
def core_dumps() -> Iterator[None]:
    """This process, and those that it starts, may leave them."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    if before[1] == 0:
        pytest.skip("core dumps are forbidden here")
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, before)


@pytest.fixture(params=["disk", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A root to write to: the same test runs on disk and on S3."""
    if request.param == "disk":
        return str(tmp_path / "store")
    return request.getfixturevalue("s3_uri")


@pytest.fixture(scope="session")
def ray_cluster(s3_server: LocalS3) -> Iterator[str]:
    """One Ray of two CPUs for the whole run, started after S3 so that its workers can reach it.
    Yields the value of `RAY_AUTH_TOKEN` with which another process may join it."""
    from lungopacity.runtime import ray_session

    with ray_session():
        from ray._raylet import AuthenticationTokenLoader

        yield AuthenticationTokenLoader.instance().get_raw_token()
