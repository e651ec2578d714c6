from __future__ import annotations

import json

import pytest

from lungopacity.training import TrainingSettings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("workers", 0),
        ("seed", -1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("weight_decay", -0.1),
        ("warmup_fraction", 1.0),
        ("label_smoothing", 1.0),
        ("patience", -1),
        ("precision", "float8"),
    ],
)
def test_refuses_what_no_run_can_use(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        TrainingSettings(**{name: value})  # type: ignore[arg-type]


def test_refuses_a_batch_that_workers_cannot_share() -> None:
    with pytest.raises(ValueError, match="multiple of workers"):
        TrainingSettings(batch_size=32, workers=3)


def test_every_setting_can_be_written_as_json() -> None:
    document = json.loads(json.dumps(TrainingSettings(model_settings={"dropout": 0.1}).as_json()))
    assert document["model_settings"] == {"dropout": 0.1}
    assert document["augmentation"]["rotation_degrees"] > 0
    assert document["preprocessing"]["image_size"] > 0
