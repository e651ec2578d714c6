import json

import pytest

from lungopacity.benchmark import conditions  # noqa: F401 - before what it imports is replaced
from lungopacity.benchmark.decode import DecodeSpeed
from lungopacity.benchmark.feeding import feeding, table
from lungopacity.benchmark.forward import ForwardSpeed
from lungopacity.cli import main

DECODED = [
    DecodeSpeed("PNG", "lungopacity", 500.0, 0.0, 0),
    DecodeSpeed("PNG", "Pillow", 100.0, 0.0, 0),
    DecodeSpeed("DICOM, RLE", "lungopacity", 100.0, 0.0, 0),
]
SCORED = [
    ForwardSpeed("m", "GPU", "float32", 1, 300.0),
    ForwardSpeed("m", "GPU", "float32", 64, 1000.0),
    ForwardSpeed("m", "GPU", "bfloat16", 64, 2000.0),
    ForwardSpeed("m", "GPU", "bfloat16", 256, None),
]


def test_so_many_cores_decode_what_one_gpu_scores():
    found = {(row.format, row.precision): row for row in feeding(DECODED, SCORED, 0.04, 2.5)}
    assert {key: row.cores for key, row in found.items()} == {
        ("PNG", "float32"): 2.0,
        ("PNG", "bfloat16"): 4.0,
        ("DICOM, RLE", "float32"): 10.0,
        ("DICOM, RLE", "bfloat16"): 20.0,
    }
    # 1,000 s of the GPU and of two cores.
    assert found["PNG", "float32"].dollars == pytest.approx(1000 / 3600 * (2.5 + 2 * 0.04))
    assert len(table(list(found.values())).splitlines()) == 5


def test_a_gpu_without_memory_for_any_batch_is_fed_by_nobody():
    assert feeding(DECODED, SCORED[3:], 0.04, 2.5) == []


@pytest.mark.parametrize(("gpus", "rows"), [(1, 4), (0, 0)])
def test_the_command_tells_it_of_a_model_where_there_is_a_gpu(monkeypatch, capfd, gpus, rows):
    monkeypatch.setattr("lungopacity.benchmark.decode.decode_speeds", lambda **_: DECODED)
    monkeypatch.setattr("lungopacity.benchmark.forward.speeds_on_gpu", lambda model: SCORED)
    monkeypatch.setattr("lungopacity.benchmark.place.gpus_here", lambda: gpus)
    assert main(["benchmark", "decode", "--model", "m", "--core-hour", "0", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert len(found["feeding"]) == rows
    skipped = "cores that keep a GPU fed: skipped: torch.cuda.is_available() is False"
    assert found["notes"] == ([] if rows else [skipped])
    if rows:
        assert found["feeding"][0]["dollars"] == pytest.approx(1000 / 3600 * 2.5)
