"""What operators see of a real run: Prometheus figures on Ray's own endpoint, and log lines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from lungopacity.observe import NAMES
from lungopacity.storage import open_store
from tests.films import encoded, grey_film, tar
from tests.models.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import logging, sys, time, urllib.request
import ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
         logging_level=logging.ERROR)
from lungopacity.cli import main
main(["--log-format", "json", "screen", *sys.argv[2:]])

# What the last round of a run does with an object that killed every reader.
from lungopacity.archive.inventory import plan_table
from lungopacity.screening.parts import write_crashed
from lungopacity.storage import ObjectInfo, open_store
write_crashed(open_store("elsewhere"), "_work/x/", plan_table([ObjectInfo.gone("x")]), ["A", "B"])
(node,) = ray.nodes()
seen = {}
for _ in range(60):
    time.sleep(0.5)
    address = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    # A gauge is told once after it was set, by each process when its time has come.
    for line in urllib.request.urlopen(address).read().decode().splitlines():
        if line.startswith("ray_lungopacity_"):
            seen[line.rsplit(" ", 1)[0]] = line
    told = " ".join(seen)
    # Each worker tells its own counts.
    images = [float(line.rsplit(" ", 1)[1]) for line in seen.values() if "_images_total{" in line]
    if sum(images) >= 14 and all(name in told for name in sys.argv[1].split(",")):
        break
print(*seen.values(), sep=chr(10))
"""


def test_a_run_exports_its_figures_and_logs_json_with_its_id(tmp_path: Path):
    store = open_store(str(tmp_path / "archive"))
    for number in range(7):
        store.write(f"SECRET^NAME-{number}.png", encoded(grey_film(number)))
    store.write("broken.png", b"\x89PNG\r\n\x1a\n")
    store.write("x.tar", tar({f"{n}.png": encoded(grey_film(n)) for n in range(5)}))
    write_tiny_model(str(tmp_path / "model"), is_compiled=True)
    places = [f"--{name}={tmp_path / name}" for name in ("archive", "model", "output")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, ",".join(NAMES), *places, "--run-id", "night"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    figures: dict[str, float] = {}
    for line in done.stdout.splitlines():
        found = re.fullmatch(r"ray_lungopacity_(\w+?)(?:_total)?(\{.*\}) (\S+)", line)
        if found:
            tags = dict(re.findall(r'(status|error_code)="(\w*)"', found[2]))
            name = found[1] + "".join(f",{tags[tag]}" for tag in sorted(tags))
            figures[name] = figures.get(name, 0.0) + float(found[3])
    assert figures["images,,ok"] == 12, done.stderr
    assert figures["images,corrupt_image,failed"] == 1
    assert figures["images,reader_crash,failed"] == 1
    assert figures["objects_planned"] == 9
    assert figures["objects_waiting"] == 0
    assert figures["images_done"] == 13
    assert figures["fetched_bytes"] == sum(item.size_bytes for item in store.list())
    assert all(figures[name] > 0 for name in ("fetch_seconds", "decode_seconds", "model_seconds"))
    assert {name.split(",")[0] for name in figures} == set(NAMES)
    assert "SECRET" not in done.stdout + done.stderr

    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert {line["run_id"] for line in lines} == {"night"}
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    assert any("9 of 9 objects" in line["message"] for line in lines)
