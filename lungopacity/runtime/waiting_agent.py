"""Stands in for an agent of a private Ray, and becomes it when Ray calls. Run as a script.

Ray starts two agents beside its raylet, and no worker before it knows where they listen. Both are
Python programs that import Ray, which takes more than a second of CPU time each. The agent for
dashboards has nothing to do where there is none; the one for runtime environments only for tasks
that have one. This program imports little, tells Ray where it listens, and waits.

That ports are told by files is not documented: see `ray_internals`.
"""

from __future__ import annotations

import os
import select
import socket
import sys
from pathlib import Path

_UNUSED_PORTS = "dashboard_agent_listen_port", "metrics_agent_port", "metrics_export_port"
"""Of the agent for dashboards. It tells -1 where it has no server."""
_CALLED_PORT = "runtime_env_agent_port"
_LOOK_S = 1.0


def main(session: str, command: list[str]) -> None:
    """Wait until Ray ends.

    `session`: Ray's folder for this session. `command`: starts the agent for runtime environments
    once that is called; empty for the agent for dashboards.
    """
    raylet = os.getppid()
    if not command:
        for name in _UNUSED_PORTS:
            _tell(session, name, -1)
        _is_called([], raylet)
        return
    host = next(part.partition("=")[2] for part in command if part.startswith("--node-ip-address="))
    family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.create_server(address[:2], family=family) as server:
        port = server.getsockname()[1]
        _tell(session, _CALLED_PORT, port)
        if not _is_called([server], raylet):
            return
    # Until the agent listens there, Ray's calls are refused, and it calls again.
    os.execv(command[0], [*command, f"--runtime-env-agent-port={port}"])


def _is_called(servers: list[socket.socket], raylet: int) -> bool:
    """Wait for a call. False: the raylet has ended, and its children belong to another process."""
    while os.getppid() == raylet != 1:
        if select.select(servers, [], [], _LOOK_S)[0]:
            return True
    return False


def _tell(session: str, name: str, port: int) -> None:
    told = Path(session, f"{name}_{os.environ['RAY_NODE_ID']}")
    # Renamed, because Ray may look at any moment.
    part = told.with_name(f"{told.name}.part")
    part.write_text(str(port))
    part.rename(told)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
