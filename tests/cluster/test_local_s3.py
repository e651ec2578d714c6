"""Tests can rely on the loopback S3 server: it refuses what S3 does, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from cluster import local_s3
from cluster.local_s3 import LocalS3

pytest.importorskip("boto3")

SCRIPT = str(Path(local_s3.__file__))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalS3]:
    with LocalS3(tmp_path_factory.mktemp("s3")) as running:
        running.create_bucket("films")
        yield running


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _becomes_false(lives: int, within_s: float = 15.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not _group_lives(lives):
            return True
        time.sleep(0.05)
    return False


def test_an_object_comes_back_as_it_was_put(server: LocalS3) -> None:
    client = server.client()
    client.put_object(Bucket="films", Key="a/b.png", Body=b"\x00\xff pixels")
    assert client.get_object(Bucket="films", Key="a/b.png")["Body"].read() == b"\x00\xff pixels"


def test_the_environment_alone_leads_to_the_server(
    server: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    names = [
        bucket["Name"] for bucket in boto3.session.Session().client("s3").list_buckets()["Buckets"]
    ]
    assert names == ["films"], "the start-up probe leaves no bucket behind"


def test_a_wrong_secret_is_refused(server: LocalS3) -> None:
    stranger = boto3.session.Session().client(
        "s3",
        endpoint_url=server.endpoint_url,
        aws_access_key_id=server.access_key,
        aws_secret_access_key="not-the-secret",
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}),
    )
    with pytest.raises(ClientError) as refused:
        stranger.put_object(Bucket="films", Key="intruder", Body=b"x")
    assert refused.value.response["Error"]["Code"] == "SignatureDoesNotMatch"


def test_if_none_match_keeps_the_first_object(server: LocalS3) -> None:
    client = server.client()
    client.put_object(Bucket="films", Key="commit.json", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError) as refused:
        client.put_object(Bucket="films", Key="commit.json", Body=b"second", IfNoneMatch="*")
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert client.get_object(Bucket="films", Key="commit.json")["Body"].read() == b"first"


def test_a_bucket_that_nobody_made_is_refused(server: LocalS3) -> None:
    with pytest.raises(ClientError) as refused:
        server.client().put_object(Bucket="typo", Key="a", Body=b"x")
    assert refused.value.response["Error"]["Code"] == "NoSuchBucket"


def test_create_bucket_twice_is_no_error_and_a_name_that_s3_refuses_is_one(server: LocalS3) -> None:
    server.create_bucket("films")
    with pytest.raises(RuntimeError, match=r"bucket 'Films_2026' cannot be created: .*not valid"):
        server.create_bucket("Films_2026")


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, SCRIPT, "--folder", str(tmp_path / "file" / "s3"), "--", "true"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: .* Not a directory: '.*/file/s3/data'\n", done.stderr)


def test_only_loopback_listens(server: LocalS3) -> None:
    port = int(server.endpoint_url.rpartition(":")[2])
    # Another address of the loopback network stands for every other interface.
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.2", port)) != 0


def test_a_restart_keeps_the_data_survives_a_port_clash_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = LocalS3(tmp_path)
    server.start()
    first_secret = server.secret_key
    server.create_bucket("films")
    server.client().put_object(Bucket="films", Key="a", Body=b"kept")
    group = server.process_group
    assert group is not None
    assert _group_lives(group)
    server.stop()
    assert not _group_lives(group)
    server.stop()

    choose = local_s3._free_ports
    with socket.socket() as occupant:
        occupant.bind(("127.0.0.1", 0))
        occupant.listen()
        clash = {**choose(), "s3.port": occupant.getsockname()[1]}
        choices = iter([clash, choose()])
        monkeypatch.setattr(local_s3, "_free_ports", lambda: next(choices))
        with server:
            assert next(choices, None) is None, "the clash made it choose a second time"
            assert server.secret_key != first_secret
            assert server.client().get_object(Bucket="films", Key="a")["Body"].read() == b"kept"


def test_a_server_that_cannot_start_says_what_its_log_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "weed"
    broken.write_text("#!/bin/sh\necho disk on fire >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(local_s3, "_find_weed", lambda: str(broken))
    with pytest.raises(RuntimeError, match="disk on fire"):
        LocalS3(tmp_path / "s3").start()


def test_the_command_gets_the_variables_and_its_exit_code_is_returned(tmp_path: Path) -> None:
    code = (
        "import boto3, os, sys\n"
        "assert 'AWS_SESSION_TOKEN' not in os.environ\n"
        "assert os.environ['NO_PROXY'] == 'intranet,127.0.0.1'\n"
        "boto3.client('s3').put_object(Bucket='films', Key='a', Body=b'x')\n"
        "sys.exit(7)"
    )
    result = subprocess.run(
        [
            *(sys.executable, SCRIPT, "--folder", str(tmp_path), "--bucket", "films", "--"),
            *(sys.executable, "-c", code),
        ],
        # Most hospitals reach the internet through a proxy, which does not reach loopback here.
        env={
            **{name: value for name, value in os.environ.items() if name.lower() != "no_proxy"},
            "AWS_SESSION_TOKEN": "a stale one",
            "HTTP_PROXY": "http://127.0.0.1:9",
            "NO_PROXY": "intranet",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 7, result.stderr


def test_a_command_that_ctrl_c_ends_exits_with_130(tmp_path: Path) -> None:
    with subprocess.Popen(
        [
            sys.executable,
            SCRIPT,
            "--folder",
            str(tmp_path),
            "--",
            "sh",
            "-c",
            "echo; exec sleep 60",
        ],
        stdout=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        assert running.stdout is not None
        running.stdout.readline()
        # As a terminal does: to the script and to its command.
        os.killpg(running.pid, signal.SIGINT)
        assert running.wait(60) == 128 + signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_server_ends_with_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, SCRIPT, "--folder", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        # A background job of a shell, as a test run may be, ignores SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as parent:
        assert parent.stdout is not None
        lines = [parent.stdout.readline() for _ in range(6)]
        assert any(line.startswith("export AWS_ENDPOINT_URL=http://127.0.0.1:") for line in lines)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        group = int(children[0])
        parent.send_signal(number)
        parent.wait(20)
    assert _becomes_false(group)


def test_a_callers_profile_token_or_endpoint_does_not_outrank_the_server(tmp_path, monkeypatch):
    caller = {
        "AWS_PROFILE": "hospital",
        "AWS_SESSION_TOKEN": "a stale one",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": "theirs",
    }
    for name, value in caller.items():
        monkeypatch.setenv(name, value)
    with LocalS3(tmp_path) as server:
        server.create_bucket("films")
        with server.as_environment():
            import boto3

            client = boto3.session.Session().client("s3")
            client.put_object(Bucket="films", Key="a", Body=b"x")
            assert client.meta.endpoint_url == server.endpoint_url
    assert {name: os.environ.get(name) for name in caller} == caller
