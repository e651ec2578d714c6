"""What `train` tells of a run, without Ray and without training."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import lungopacity
from lungopacity.training.task import TrainingTask

EPOCHS = 40


def row(epoch: int) -> dict[str, Any]:
    figures = ("validation_loss", "validation_accuracy", "images_per_s")
    return {"epoch": epoch, **dict.fromkeys(figures, 0.5)}


@pytest.mark.parametrize(
    ("earlier", "new", "last"),
    [
        (0, [], "stopped before an epoch was finished; the same command starts again"),
        (0, [1, 2], "stopped after epoch 2 of 40; the same command resumes there"),
        (2, [3], "stopped after epoch 3 of 40; the same command resumes there"),
        (2, [], "stopped after epoch 2 of 40; the same command resumes there"),
        (EPOCHS, None, "Training: 40 of 40 epochs"),
    ],
)
def test_what_an_earlier_run_did_is_counted_and_a_stopped_one_says_what_is_kept(
    earlier: int, new: list[int] | None, last: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """new: epochs before Ctrl-C; None: the run goes on to its end."""
    labels = tmp_path / "labels.csv"
    labels.write_text(
        "image,label,split\na,Normal,train\nb,Lung_Opacity,train\n"
        "c,Normal,validation\nd,Lung_Opacity,validation\n"
    )

    def fit(*_: Any, on_start: Any, on_epoch: Any, **__: Any) -> None:
        on_start("run", [row(number) for number in range(1, earlier + 1)])
        for number in new or ():
            on_epoch(row(number))
        if new is not None:
            raise KeyboardInterrupt

    for name, stand_in in (
        ("fit", fit),
        ("ray_session", nullcontext),
        ("resolve_gpu", lambda _: False),
        ("start_of", lambda *_: None),
        ("run_logs", lambda *_: nullcontext(Mock())),
    ):
        monkeypatch.setattr(f"lungopacity.training.train.{name}", stand_in)
    monkeypatch.setattr(TrainingTask, "load", lambda _: None)
    caplog.set_level(logging.INFO, "lungopacity")
    with nullcontext() if new is None else pytest.raises(KeyboardInterrupt):
        lungopacity.train(["films"], str(labels), str(tmp_path / "model"), epochs=EPOCHS)
    assert caplog.messages[-1] == last
    assert (f"resumed after epoch {earlier} of 40" in caplog.messages) is (earlier > 0)
