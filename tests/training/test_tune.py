"""A real search on a real Ray, which several tests share."""

from __future__ import annotations

import io
import json
import shlex
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

import lungopacity
from lungopacity.archive.phantom import PhantomSettings, write_phantom_archive
from lungopacity.cli import main
from lungopacity.errors import UserError
from lungopacity.models import read_history
from lungopacity.storage import open_store
from lungopacity.training.settings import TrainingSettings
from lungopacity.training.trials import Trials
from tests.parquet_pages import has_page_checksums

SEARCH = {
    "learning_rate": "choice:0.004,3,1e30",
    "model_settings.hidden_units": f"choice:0,{10**15}",
}
# With this seed trial 1 is sound, 2 learns far too fast, 3 diverges and 4 runs out of memory.
SEED = 429


@dataclass
class Search:
    arguments: dict[str, Any]
    output: str
    result: lungopacity.TuneResult

    @property
    def rows(self) -> dict[int, dict[str, Any]]:
        return {row["trial"]: row for row in self.result.trials.to_pylist()}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("films"))
    write_phantom_archive(open_store(folder), PhantomSettings(images=80, image_size=96))
    return folder


@pytest.fixture(scope="module")
def searched(ray_cluster: None, films: str, tmp_path_factory: pytest.TempPathFactory) -> Search:
    output = str(tmp_path_factory.mktemp("search") / "out")
    arguments = {
        "images": [f"{films}/archive"],
        "labels": f"{films}/labels.csv",
        "output": output,
        "trials": 5,
        "search": SEARCH,
        "image_size": 32,
        "epochs": 4,
        "batch_size": 16,
        "settings": {"model_settings.channels": "[8,16]", "model_settings.convolutions": "[1,1]"},
        "seed": SEED,
    }
    return Search(arguments, output, lungopacity.tune(**arguments))


def test_every_trial_is_a_row_however_it_ended(searched: Search) -> None:
    told = {number: row["status"] for number, row in searched.rows.items()}
    assert {number: told[number] for number in (2, 3, 4)} == {
        2: "stopped",
        3: "diverged",
        4: "failed",
    }
    # The worse of the first two may be stopped; which that is, is chance.
    assert "done" in (told[0], told[1])
    assert {told[0], told[1]} <= {"done", "stopped"}
    assert searched.rows[2]["epochs_trained"] < 4
    assert searched.rows[3]["error"].startswith("the loss of epoch 1 is not finite")
    assert "you tried to allocate" in searched.rows[4]["error"]
    assert searched.rows[4]["validation_loss"] is None
    assert all(row["error"] is None for row in (searched.rows[n] for n in range(3)))


def test_the_best_trial_comes_first_with_its_figures(searched: Search) -> None:
    rows = searched.result.trials.to_pylist()
    losses = [row["calibrated_loss"] for row in rows if row["calibrated_loss"] is not None]
    assert losses == sorted(losses)
    assert 1 <= rows[0]["best_epoch"] <= rows[0]["epochs_trained"] <= 4
    assert 0 <= rows[0]["validation_auc"] <= 1
    assert rows[0]["calibrated_loss"] <= 1.001 * rows[0]["validation_loss"]
    assert searched.rows[0]["learning_rate"] is None  # the recipe's own
    assert searched.rows[1]["learning_rate"] == 0.004
    written = open_store(searched.output)
    data = written.read("trials.parquet")
    assert pq.read_table(io.BytesIO(data)) == searched.result.trials
    assert has_page_checksums(data)
    best = json.loads(written.read("best.json"))
    assert best == searched.result.best
    assert "Research use only" in best["notice"]


@pytest.mark.usefixtures("only_trained")
def test_the_command_of_the_best_trains_the_same_model(searched: Search, tmp_path) -> None:
    words = shlex.split(searched.result.best["command"])[1:]
    words[words.index("--output") + 1] = str(tmp_path / "model")
    assert main(words) == 0
    history = pq.read_table(io.BytesIO(read_history(str(tmp_path / "model")))).to_pylist()
    best = searched.result.best
    trained = history[best["best_epoch"] - 1]["validation_loss"]
    assert trained == pytest.approx(best["validation_loss"], rel=0.02)


def test_the_same_command_resumes_and_more_trials_are_added(searched: Search) -> None:
    kept = Path(searched.output, "trials")
    before = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert set(before) == {f"0000{number}.json" for number in range(5)}
    lost = json.loads((kept / "00001.json").read_text())
    (kept / "00001.json").unlink()  # as if killed before it ended
    cut = lungopacity.tune(**searched.arguments, time_budget_s=0.01).trials.to_pylist()
    assert {row["trial"]: row["status"] for row in cut}.get(1, "out of time") == "out of time"
    assert not (kept / "00001.json").exists()
    again = lungopacity.tune(**searched.arguments)
    found = {row["trial"]: row for row in again.trials.to_pylist()}
    # Running alone, it is not stopped, and reaches at least as good an epoch.
    assert found[1]["status"] == "done"
    assert found[1]["validation_loss"] <= 1.02 * lost["validation_loss"]
    for path in kept.iterdir():
        assert path.name == "00001.json" or path.stat().st_mtime_ns == before[path.name]


def test_tune_can_pickle_a_callback_that_holds_a_terminal(tmp_path) -> None:
    watching = Trials(open_store(str(tmp_path)), {}, TrainingSettings())
    lock = threading.Lock()  # such as rich's live line has
    watching.on_row = lambda note: lock.release()
    ray.cloudpickle.dumps(watching)


def test_another_search_needs_another_output(searched: Search) -> None:
    with pytest.raises(UserError, match="holds a search with other settings"):
        lungopacity.tune(**{**searched.arguments, "epochs": 5})


def test_a_search_in_which_nothing_succeeds_says_why(searched: Search, tmp_path) -> None:
    output = tmp_path / "out"
    (output / "trials").mkdir(parents=True)
    failed = json.loads(Path(searched.output, "trials", "00004.json").read_text())
    (output / "trials" / "00000.json").write_text(json.dumps({**failed, "trial": 0}))
    with pytest.raises(UserError, match=r"no trial of 1 gives a model: .*you tried to allocate"):
        lungopacity.tune(**{**searched.arguments, "output": str(output), "trials": 1})
    assert pq.read_table(output / "trials.parquet")["status"].to_pylist() == ["failed"]
    assert not (output / "best.json").exists()


def test_a_row_that_cannot_be_written_is_reported_as_such(searched: Search, tmp_path) -> None:
    (tmp_path / "trials" / "00000.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"trials/00000\.json: cannot be written .*; check permiss"):
        lungopacity.tune(
            **{**searched.arguments, "output": str(tmp_path), "trials": 1, "epochs": 1}
        )


def test_the_error_names_the_option_that_is_wrong(films, tmp_path, capsys) -> None:
    common = ["tune", "--images", f"{films}/archive", "--labels", f"{films}/labels.csv",
              "--output", str(tmp_path)]  # fmt: skip
    for more, said in (
        (["--search", "seed=int:0:9"], "error: --search seed: is the same in all trials"),
        (["--trials", "0"], "error: --trials must be 1 or more"),
        (["--set", "workers=4"], "error: --set workers: every trial has one worker"),
        (["--set", "max_workers=4"], "error: --set max_workers: every trial has one worker"),
        (["--time-budget-s", "0"], "error: --time-budget-s must be above 0"),
    ):
        assert main([*common, *more]) == 2
        assert said in capsys.readouterr().err
