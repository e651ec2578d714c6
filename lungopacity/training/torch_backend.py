"""How torch connects the workers of a training: on which network interface of each node.

On CPUs, gloo connects them. By default it listens on the address of the node's name. On Debian that
is 127.0.1.1, which no other node can reach; so the interface is named for it.

On GPUs, NCCL connects them. It looks at the interfaces themselves, and takes a loopback one only if
there is no other. So none is named for it: it may share its traffic out over several, or over
InfiniBand, of which Ray's address tells nothing.
"""

from __future__ import annotations

import os
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
"""The environment variable in which gloo looks."""


def interface_of(address: str) -> str | None:
    """The name of this machine's network interface that has the IPv4 or IPv6 address; None if none
    has, as where addresses are translated between networks."""
    wanted = _address(address)
    for name, has in psutil.net_if_addrs().items():
        if wanted is not None and wanted in [_address(one.address) for one in has]:
            return str(name)
    return None


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """None if it is the name of a host, or the address of hardware."""
    try:
        return ip_address(text.partition("%")[0])  # the name of an interface may follow the %
    except ValueError:
        return None


def name_interface() -> None:
    """Let gloo, in this Ray worker, listen on the interface that has Ray's address of this node,
    unless the user names another: Ray's processes on other nodes reach this one there."""
    interface = interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        os.environ.setdefault(GLOO_INTERFACE, interface)


class OnNodesInterface(TorchConfig):  # type: ignore[misc]  # ray ships no types
    """Ray's `TorchConfig` with `name_interface`."""

    @property
    def backend_cls(self) -> type[Any]:
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)
