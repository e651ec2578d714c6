"""A search whose trials do not run: the test reports their results as Tune would."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lungopacity.training.tune as tuning
from lungopacity.errors import UserError
from lungopacity.models import build_network, weights_of
from lungopacity.models.folder import training_films_parquet
from lungopacity.storage import open_store
from lungopacity.training.search_space import search_space
from lungopacity.training.settings import TrainingSettings
from lungopacity.training.task import TrainingTask
from lungopacity.training.trials import Trials, best_of, trials_table
from lungopacity.training.tune import TuneResult
from tests.models.tiny import write_tiny_model
from tests.training.blobs import blob_films

SEARCH = {"learning_rate": "log:1e-4:1e-2", "label_smoothing": "uniform:0:0.3"}


def tell(
    known: Trials,
    number: int,
    *losses: float,
    end: str = "complete",
    overconfidence: float = 0.0,
) -> None:
    """Reports a trial to `known`. losses: calibrated loss of each epoch, where inf means that it
    diverged. end: complete or error; empty means that the time budget ended it. overconfidence: by
    how much the raw loss is above the calibrated one."""
    trial = SimpleNamespace(config={"trial": number}, pickled_error_file=None)
    for epoch, loss in enumerate(losses, start=1):
        row = {"epoch": epoch, "calibrated_loss": loss, "seconds": 1.0}
        row["validation_loss"] = loss + overconfidence
        known.on_trial_result(0, [], trial, {**row, **({"diverged": True} if loss == inf else {})})
    if end:
        getattr(known, f"on_trial_{end}")(0, [], trial)


@pytest.fixture
def known(tmp_path: Path) -> Trials:
    settings = TrainingSettings(epochs=4)
    return Trials(open_store(str(tmp_path)), search_space(settings, SEARCH), settings)


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., TuneResult]:
    """`tune` of five trials without Ray; later trials are better."""
    (tmp_path / "labels.csv").write_text(
        "image,label,split\n"
        + "".join(
            f"{split}{label}.png,{label},{split}\n"
            for split in ("train", "validation")
            for label in ("Normal", "Lung_Opacity")
        )
    )

    def run(*given: Any) -> None:
        known, waiting, _ = given[-3:]
        for number in waiting:
            tell(known, number, 1 / (1 + number))

    monkeypatch.setattr(tuning, "ray_session", contextlib.nullcontext)
    monkeypatch.setattr(tuning, "resolve_gpu", bool)
    monkeypatch.setattr(tuning, "require_resources", lambda *_: None)
    monkeypatch.setattr(TrainingTask, "load", lambda _: blob_films(8, 6, 0))
    monkeypatch.setattr(tuning, "_run", run)
    common = {"images": ["films"], "labels": str(tmp_path / "labels.csv"), "trials": 5,
              "output": str(tmp_path / "out"), "search": SEARCH}  # fmt: skip
    return lambda **more: tuning.tune(**{**common, **more})


def test_of_epochs_with_the_same_loss_the_last_counts_as_in_training(known: Trials) -> None:
    tell(known, 0, 0.3, 0.2, 0.2, 0.4)
    assert known.rows[0]["best_epoch"] == 3


def test_the_best_has_the_exact_words_that_it_was_trained_with(search, tmp_path) -> None:
    for given in (SEARCH, dict(reversed(SEARCH.items()))):
        best = search(search=given).best
        kept = json.loads((tmp_path / "out" / "trials" / "00004.json").read_text())
        assert best["trial"] == 4
        assert best["settings"] == kept["words"]
        assert all(
            f"--set {name}={word}" in best["command"] for name, word in kept["words"].items()
        )


def test_a_search_is_resumed_only_from_the_same_weights(search, monkeypatch, tmp_path) -> None:
    file = tmp_path / "first.safetensors"
    file.write_bytes(weights_of(build_network("classical-cnn", 2)))
    search(trials=2, weights=str(file))
    search(trials=3, weights=str(file))
    with monkeypatch.context() as other:
        other.setattr(tuning, "versions", lambda: {"lungopacity": "0.0"})
        with pytest.raises(UserError, match=r"holds a search with .* another version"):
            search(trials=4, weights=str(file))
    file.write_bytes(weights_of(build_network("classical-cnn", 2)))  # drawn anew
    with pytest.raises(
        UserError, match="holds a search with other settings, films, splits, weights"
    ):
        search(trials=4, weights=str(file))
    file.unlink()
    monkeypatch.setattr(TrainingTask, "load", lambda _: pytest.fail("films were decoded"))
    with pytest.raises(UserError, match=r"--weights .*cannot be read"):
        search(trials=4, weights=str(file))


def test_any_setting_can_be_searched_beside_the_figures(search) -> None:
    found = search(search={"epochs": "int:5:50"})
    drawn = [row["epochs"] for row in found.trials.to_pylist()]
    assert drawn[-1] is None  # the recipe's own
    assert all(5 <= epochs <= 50 for epochs in drawn[:-1])
    assert found.trials["epochs_trained"].to_pylist() == [1] * 5
    # No other column has the name of a setting.
    assert not set(found.best) - {"epochs"} & set(TrainingSettings.__dataclass_fields__)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epochs": "uniform:4:40"}, "--search epochs: .* give int:4:40"),
        ({"model_settings.dropout": "uniform:0:2"}, "--search model_settings.dropout: .* not 2"),
        ({"patience": f"int:0:{10**19}"}, "--search .*int64"),  # which is refused when it is drawn
    ],
)
def test_a_space_that_no_trial_can_be_drawn_from_is_refused_first(
    search, monkeypatch, tmp_path, given, said
) -> None:
    monkeypatch.setattr(TrainingTask, "load", lambda _: pytest.fail("films were decoded"))
    with pytest.raises(UserError, match=said):
        search(search=given)
    assert not (tmp_path / "out").exists()


def test_no_trial_that_diverged_or_failed_is_the_best(known) -> None:
    said: list[str] = []
    known.on_row = said.append
    tell(known, 1, 0.5, 0.30, inf)
    tell(known, 2, 0.5, 0.33, end="error")
    assert best_of(known.rows.values()) is None
    tell(known, 0, 0.39, 0.38, 0.37, 0.36)
    assert said == ["", "", "lowest calibrated loss 0.3600"]
    rows = trials_table(known.rows.values(), known.space).to_pylist()
    assert [(row["trial"], row["status"]) for row in rows] == [
        (0, "done"),
        (1, "diverged"),
        (2, "failed"),
    ]
    assert rows[1]["validation_loss"] == 0.30  # of its epoch before
    assert best_of(known.rows.values()) == known.rows[0]


def test_a_finished_trial_keeps_its_epochs(known, tmp_path) -> None:
    tell(known, 0, 0.5, 0.4)
    curve = json.loads((tmp_path / "trials" / "00000.json").read_text())["curve"]
    assert [(row["epoch"], row["calibrated_loss"]) for row in curve] == [(1, 0.5), (2, 0.4)]
    again = Trials(open_store(str(tmp_path)), known.space, TrainingSettings(epochs=4))
    assert trials_table(again.rows.values(), known.space).num_rows == 1


def test_first_weights_that_learnt_from_a_validation_film_are_refused(search, tmp_path) -> None:
    films = blob_films(8, 6, 0)
    validation = films.images["content_sha256"][films.split_N == "validation"]
    write_tiny_model(str(tmp_path / "first"), training_films_parquet(list(validation[:1])))
    with pytest.raises(
        UserError, match="learnt from 1 of 6 films of the validation split, such as 8"
    ):
        search(weights=str(tmp_path / "first" / "model.safetensors"))


def test_confidence_that_calibration_corrects_does_not_make_a_trial_worse(known) -> None:
    tell(known, 0, 0.4, 0.3, overconfidence=0.2)
    tell(known, 1, 0.4, 0.35)
    assert best_of(known.rows.values())["trial"] == 0
    rows = trials_table(known.rows.values(), known.space).to_pylist()
    assert [row["calibrated_loss"] for row in rows] == [0.3, 0.35]
    assert rows[0]["validation_loss"] == 0.5


def test_a_search_whose_trials_all_diverge_has_no_best(search, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(tuning, "_run", lambda *given: tell(given[-3], 0, 0.5, inf))
    with pytest.raises(
        UserError, match="no trial of 1 gives a model: the loss of epoch 2 is not f"
    ):
        search(trials=1)
    assert not (tmp_path / "out" / "best.json").exists()


def test_a_trial_that_the_time_budget_cuts_short_is_a_row_and_runs_again(known, tmp_path) -> None:
    tell(known, 0, 0.4, 0.3, 0.3, 0.3)
    tell(known, 1, 0.2, end="")
    known.out_of_time()
    rows = trials_table(known.rows.values(), known.space).to_pylist()
    assert [(row["trial"], row["status"]) for row in rows] == [(1, "out of time"), (0, "done")]
    assert best_of(known.rows.values())["trial"] == 1
    again = Trials(open_store(str(tmp_path)), known.space, TrainingSettings(epochs=4))
    assert set(again.rows) == {0}


def test_two_searches_do_not_share_an_output_at_once(
    search: Callable[..., TuneResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "LEASE_S", 1.0)
    run, said = tuning._run, []

    def another_begins(*given: Any) -> None:
        with pytest.raises(UserError) as refused:
            search()
        said.append(str(refused.value))
        run(*given)

    monkeypatch.setattr(tuning, "_run", another_begins)
    assert len(search().trials) == 5
    assert "another job is at work there: tuning of classical-cnn" in said[0]
    assert not (tmp_path / "out" / "_lock").exists()
