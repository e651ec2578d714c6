"""On which network interface gloo listens, and what is said of a node that cannot load our code.
`test_fit` looks in the workers of a real training."""

from __future__ import annotations

import os
from contextlib import nullcontext
from types import SimpleNamespace

import psutil
import pytest
from ray.exceptions import RaySystemError, RayTaskError
from ray.train.v2.api.exceptions import ControllerError

from lungopacity.errors import UserError
from lungopacity.training import ray_run
from lungopacity.training.settings import TrainingSettings
from lungopacity.training.torch_backend import GLOO_INTERFACE, interface_of, name_interface

INTERFACES = {
    "lo": ["127.0.0.1", "::1", "00:00:00:00:00:00"],
    "eth0": ["192.0.2.7", "fe80::1%eth0", "02:00:00:00:00:01"],
    "eth1": ["198.51.100.7", "2001:db8::7", "fe80::1%eth1", "02:00:00:00:00:02"],
    "tun0": [],
}


@pytest.fixture(autouse=True)
def _interfaces(monkeypatch):
    # Set first, so that what a test sets ends with it.
    monkeypatch.setenv(GLOO_INTERFACE, "")
    monkeypatch.delenv(GLOO_INTERFACE)
    has = {name: [SimpleNamespace(address=one) for one in INTERFACES[name]] for name in INTERFACES}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: has)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("192.0.2.7", "eth0"),
        ("198.51.100.7", "eth1"),
        ("2001:DB8:0::7", "eth1"),
        ("127.0.0.1", "lo"),
        ("203.0.113.1", None),
        ("head.example", None),
    ],
)
def test_the_interface_is_the_one_that_has_the_address(address, name, monkeypatch):
    assert interface_of(address) == name
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: address)
    name_interface()
    assert os.environ.get(GLOO_INTERFACE) == name


def test_an_interface_that_the_user_names_is_kept(monkeypatch):
    monkeypatch.setenv(GLOO_INTERFACE, "ib0")
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "192.0.2.7")
    name_interface()
    assert os.environ[GLOO_INTERFACE] == "ib0"


def test_a_worker_on_a_node_without_our_code_is_named(tmp_path, monkeypatch):
    """Only a node that joins after the films were read gets so far."""
    why = RaySystemError("System error: No module named 'lungopacity'\ntraceback: in\n"
                         "ModuleNotFoundError: No module named 'lungopacity'")  # fmt: skip
    failed = RayTaskError("execute", str(why), why, ip="192.0.2.7")

    def fit() -> None:
        raise ControllerError(failed)

    monkeypatch.setattr(ray_run, "TorchTrainer", lambda *_, **__: SimpleNamespace(fit=fit))
    monkeypatch.setattr("ray.put", lambda films: films)
    monkeypatch.setattr(ray_run, "lean_training", nullcontext)
    told = r"^a Ray node \(192\.0\.2\.7\) lacks the job's code: .*'lungopacity'; install"
    with pytest.raises(UserError, match=told):
        ray_run.run_ray_train(None, None, TrainingSettings(), str(tmp_path), "run", None)
