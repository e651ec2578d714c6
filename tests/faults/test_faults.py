"""One fault, once, to save time. `make faults` strikes all of them, more often, and writes
docs/reliability.md."""

from __future__ import annotations

import signal

import pytest

from tests.faults.faults import FAULTS, NotPossibleHereError
from tests.faults.scene import Scene, scene


@pytest.fixture(scope="module")
def broken_scene(tmp_path_factory: pytest.TempPathFactory):
    from cluster.local_s3 import LocalS3

    folder = tmp_path_factory.mktemp("faults")
    # An S3 server of its own, because one fault kills it.
    with LocalS3(folder / "s3") as server, server.as_environment():
        server.create_bucket("faults")
        with scene(server, "s3://faults/scene", folder) as made:
            yield made


@pytest.mark.timeout(280)
def test_each_image_is_published_once_though_a_node_is_lost(broken_scene: Scene) -> None:
    strike, _ = FAULTS["kill -9 of one node of three"]
    try:
        outcome = strike(broken_scene)
    except NotPossibleHereError as reason:
        pytest.skip(str(reason))
    assert outcome.sound, outcome


def test_a_trial_that_fails_leaves_no_job_at_work(broken_scene: Scene):
    jobs = []

    def failing_trial() -> None:
        with broken_scene.trial():
            jobs.append(broken_scene.start())
            raise AssertionError("as planned")

    with pytest.raises(AssertionError, match="as planned"):
        failing_trial()
    assert [job.poll() for job in jobs] == [-signal.SIGKILL]
