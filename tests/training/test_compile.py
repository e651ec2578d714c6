from dataclasses import replace

import numpy as np
import pytest

import lungopacity
from lungopacity.cli import main
from lungopacity.errors import UserError
from lungopacity.models import (
    OperatingPoint,
    films_known_to,
    load_model,
    save_model,
    save_operating_point,
    with_operating_point,
)
from lungopacity.models.folder import training_films_parquet, validation_parquet
from lungopacity.models.scorer import Scorer
from lungopacity.radiograph import Preprocessing
from tests.models.tiny import history_parquet, tiny_model, write_tiny_model
from tests.training import compilers

FILMS = np.random.default_rng(0).integers(0, 256, (6, 64, 64), dtype=np.uint8)


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr("lungopacity.training.compile._compiled", compilers.on_a_quiet_machine)


@pytest.mark.usefixtures("quiet")
def test_the_compiled_folder_keeps_the_id_and_the_points_of_sites(tmp_path, capsys):
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    learnt = training_films_parquet(["a", "b"])
    said = validation_parquet(["c"], ["Normal"], np.zeros((1, 2), np.float32), ["Normal", "x"])
    save_model(old, tiny_model(image_size=64), history_parquet(), said, learnt)
    save_operating_point(old, load_model(old), "north", OperatingPoint(0.25))
    assert main(["compile", "--model", old, "--output", new]) == 0
    before, after = load_model(old), load_model(new)
    assert f"model {before.model_id} in {new}: CPUs run the network compiled" in (
        capsys.readouterr().out
    )
    assert films_known_to(new) == films_known_to(old) == {"a", "b", "c"}
    assert before.compiled is None
    assert after == replace(before, compiled=after.compiled, spec=after.spec)
    assert after.spec.training["on_cpus"].startswith("CPUs run the network compiled, ")
    assert with_operating_point(new, after, "north").spec.operating_point.threshold == 0.25
    scorer = Scorer(after)
    assert scorer.compiled is not None
    found = scorer.probabilities(scorer.logits(FILMS))
    expected = Scorer(before).probabilities(Scorer(before).logits(FILMS))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with pytest.raises(UserError, match="holds a finished model"):
        lungopacity.compile(old, new)


def test_an_output_that_cannot_be_written_to_is_refused_before_compiling(tmp_path, monkeypatch):
    write_tiny_model(str(tmp_path / "old"))
    monkeypatch.delattr("lungopacity.training.compile._compiled")
    with pytest.raises(UserError, match=r"^/proc/new"):
        lungopacity.compile(str(tmp_path / "old"), "/proc/new")


@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        (compilers.the_process_ends, "compiling crashed the process; nothing was written"),
        (compilers.slower, "compiled, it has half the speed; nothing was written"),
    ],
)
def test_a_compiled_network_that_is_not_better_is_not_written(tmp_path, monkeypatch, compiler, why):
    model, new = str(tmp_path / "model"), str(tmp_path / "new")
    write_tiny_model(model)
    monkeypatch.setattr("lungopacity.training.compile._compiled", compiler)
    with pytest.raises(UserError, match=why):
        lungopacity.compile(model, new)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("quiet")
def test_an_older_ensemble_is_compiled_member_by_member(tmp_path):
    uris = [str(tmp_path / name) for name in "ab"]
    facts = {"training": {"settings": {"seed": 7}, "data": {"fingerprint": "f"}}}
    for uri, size in zip(uris, (64, 48), strict=True):
        model = tiny_model(
            seed=size, preprocessing=Preprocessing(size, mean=0.4), temperature=0.5, **facts
        )
        pixels_NHW = FILMS[:, :size, :size]
        labels = ["Normal", "Lung_Opacity"] * 3
        digests = [f"{number}" for number in range(6)]
        kept = validation_parquet(
            digests, labels, Scorer(model).logits(pixels_NHW), model.spec.class_names
        )
        save_model(uri, model, history_parquet(), kept)
    both = lungopacity.ensemble(uris, str(tmp_path / "both"))
    assert both.compiled is None
    made = lungopacity.compile(str(tmp_path / "both"), str(tmp_path / "compiled"))
    assert made.model_id == both.model_id
    found, expected = (Scorer(model).scores(FILMS) for model in (made, both))
    np.testing.assert_allclose(found.logits_NK, expected.logits_NK, rtol=1e-4, atol=1e-5)
