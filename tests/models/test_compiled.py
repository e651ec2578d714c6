"""Compiled networks score as torch does, whatever the thread or batch."""

import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from lungopacity.models import (
    ENSEMBLE,
    NETWORK_NAMES,
    ModelSpec,
    OperatingPoint,
    TrainedModel,
    build_network,
    load_model,
    save_model,
    weights_of,
)
from lungopacity.models.compiled import (
    CompiledNetwork,
    CompileError,
    compile_network,
    compiled_if_better,
    of_bytes,
    to_bytes,
)
from lungopacity.models.ensemble_settings import EnsembleMember, EnsembleSettings
from lungopacity.models.scorer import Scorer
from lungopacity.radiograph import Preprocessing
from tests.models.tiny import compiled, tiny_model, with_distribution


def films(count: int, side: int) -> np.ndarray:
    rng = np.random.default_rng(side)
    return rng.integers(0, 256, (count, side, side), dtype=np.uint8)


def model_of(name: str, side: int = 64, settings: dict | None = None) -> TrainedModel:
    """Fresh weights, with batch statistics as after training."""
    torch.manual_seed(1)
    network = build_network(name, 3, settings or {}).train()
    with torch.no_grad():
        for _ in range(2):
            network(torch.randn(4, 1, side, side))
    spec = ModelSpec(
        architecture=name,
        architecture_settings=asdict(network.settings),
        class_names=("Normal", "Not_Normal", "Lung_Opacity"),
        positive_class="Lung_Opacity",
        preprocessing=Preprocessing(side, mean=0.4, std=0.2),
        operating_point=OperatingPoint(0.5),
        temperature=1.3,
    )
    return TrainedModel(spec, weights_of(network))


# Left out: efficientnet-lite1 and -lite2, whose layers are those of lite0, and alexnet, whose 57
# million weights take longest to translate and which torch runs faster.
@pytest.mark.parametrize(
    "name",
    [name for name in NETWORK_NAMES if name[-5:] not in ("lite1", "lite2") and name != "alexnet"],
)
def test_every_compiled_network_scores_as_in_torch(name):
    model = model_of(name)
    pixels_NHW = films(5, 64)
    expected = Scorer(model).scores(pixels_NHW)
    found = Scorer(compiled(model)).scores(pixels_NHW)
    scale = np.abs(expected.logits_NK).max()
    assert np.ptp(expected.logits_NK, axis=0).min() > 0, (
        "films that all score alike would test nothing"
    )
    np.testing.assert_allclose(found.logits_NK, expected.logits_NK, atol=1e-4 * scale)
    scale = np.abs(expected.features_NF).max()
    np.testing.assert_allclose(found.features_NF, expected.features_NF, atol=1e-4 * scale)
    assert found.disagreement_N is None


def test_threads_and_batches_change_no_bit():
    model = compiled(tiny_model())
    pixels_NHW = films(23, 32)
    alone = Scorer(model, threads=1).scores(pixels_NHW, batch_size=23)
    together = Scorer(model, threads=3).scores(pixels_NHW, batch_size=9)
    assert alone.logits_NK.tobytes() == together.logits_NK.tobytes()
    assert alone.features_NF.tobytes() == together.features_NF.tobytes()
    assert len(Scorer(model).logits(pixels_NHW[:0])) == 0


def test_bfloat16_runs_in_torch():
    model = compiled(tiny_model())
    assert Scorer(model).compiled is not None
    assert Scorer(model, precision="bfloat16").compiled is None


def test_a_compiled_ensemble_of_two_sizes_scores_as_in_torch():
    members = [model_of("classical-cnn", 64), model_of("classical-cnn", 45)]
    settings = EnsembleSettings(
        tuple(
            EnsembleMember(
                model.model_id,
                model.spec.architecture,
                dict(model.spec.architecture_settings),
                model.spec.preprocessing.image_size,
                mean=0.3 + number / 10,
                std=0.2,
                temperature=1.5 - number,
                class_biases=(0.4, 0.0, -0.4) if number else None,
                features=Scorer(model).scores(films(1, 64 - 19 * number)).features_NF.shape[1],
            )
            for number, model in enumerate(members)
        )
    )
    network = build_network(ENSEMBLE, 3, asdict(settings))
    for part, model in zip(network.members, members, strict=True):
        part.load_state_dict(model.network().state_dict())
    spec = replace(
        members[0].spec,
        architecture=ENSEMBLE,
        architecture_settings=asdict(settings),
        preprocessing=Preprocessing(64, mean=0.0, std=1.0),
    )
    model = TrainedModel(spec, weights_of(network))
    expected = Scorer(model).scores(films(9, 64))
    both = to_bytes([compile_network(member) for member in members])
    found = Scorer(replace(model, compiled=both)).scores(films(9, 64))
    for name in ("logits_NK", "features_NF", "disagreement_N"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5, err_msg=name
        )
    assert np.ptp(expected.disagreement_N) > 1e-3
    # It is about the positive class, which of three need not be the second.
    first = replace(model, spec=replace(spec, positive_class=spec.class_names[0]))
    last = replace(model, spec=replace(spec, positive_class=spec.class_names[2]))
    others = [Scorer(other).scores(films(9, 64)).disagreement_N for other in (first, last)]
    assert not np.allclose(*others, rtol=0.05)


def test_a_folder_keeps_the_compiled_network_and_the_models_id(tmp_path):
    model = tiny_model()
    with_it = compiled(model)
    save_model(str(tmp_path / "m"), with_it)
    found = load_model(str(tmp_path / "m"))
    assert found.compiled == with_it.compiled
    assert found.model_id == model.model_id
    (network,) = of_bytes(found.compiled)
    assert network == compile_network(model)


def test_scoring_with_a_compiled_network_does_not_import_torch(tmp_path):
    model = compiled(with_distribution(tiny_model(), films(40, 32)))
    save_model(str(tmp_path / "m"), model)
    program = f"""
import sys
import numpy as np
from lungopacity.models import load_model
from lungopacity.models.scorer import Scorer
scorer = Scorer(load_model({str(tmp_path / "m")!r}))
scores = scorer.scores(np.zeros((2, 32, 32), np.uint8))
assert scorer.probabilities(scores.logits_NK).shape == (2, 2)
assert scorer.out_of_distribution(scores.features_NF).shape == (2,)
assert "torch" not in sys.modules, "torch takes two seconds to import"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_its_translator_a_network_stays_in_torch(monkeypatch):
    monkeypatch.setattr("pnnx.EXEC_PATH", "/nowhere/pnnx")
    with pytest.raises(CompileError, match=r"pnnx could not translate it \(.*/nowhere/pnnx"):
        compile_network(tiny_model())


class Sorting(torch.nn.Module):
    def describe(self, x_B1HW: torch.Tensor) -> torch.Tensor:
        return torch.sort(x_B1HW, dim=3).values.mean(dim=3).flatten(1)

    def classify(self, features_BF: torch.Tensor) -> torch.Tensor:
        return features_BF[:, :2]


def test_what_ncnn_has_no_layer_for_stays_in_torch(monkeypatch):
    monkeypatch.setattr(TrainedModel, "network", lambda _: Sorting())
    with pytest.raises(CompileError, match=r"ncnn has no layer for pnnx\.Expression"):
        compile_network(tiny_model())
    found, said = compiled_if_better(tiny_model(), films(4, 32))
    assert found is None
    assert said == "CPUs run the network in torch: ncnn has no layer for pnnx.Expression"


def test_what_ncnn_cannot_load_runs_in_torch_with_a_warning(caplog):
    broken = CompiledNetwork(b"7767517\n1 1\nNoSuchLayer a 0 1 in0\n", b"")
    model = tiny_model()
    scorer = Scorer(replace(model, compiled=to_bytes([broken])))
    assert f"model {model.model_id}: ncnn cannot load the compiled network" in caplog.text
    assert "lungopacity compile" in caplog.text
    pixels_NHW = films(3, 32)
    assert scorer.logits(pixels_NHW).tobytes() == Scorer(model).logits(pixels_NHW).tobytes()


def test_a_compiled_network_with_other_scores_is_not_used(monkeypatch):
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    monkeypatch.setattr(
        "lungopacity.models.compiled.compile_network", lambda _: compile_network(other)
    )
    found, said = compiled_if_better(model, films(8, 32))
    assert found is None
    assert "probabilities differ by up to" in said


def test_the_films_that_are_tried_are_spread_over_all(monkeypatch):
    """Not only the first, which are all of one class where labels are sorted."""
    model = tiny_model(preprocessing=Preprocessing(32, mean=0.0))
    with torch.no_grad():
        other = model.network()
        # It gives the same scores for a black film, and for no other.
        next(part for part in other.modules() if isinstance(part, torch.nn.Conv2d)).weight.neg_()
    translated = compile_network(replace(model, weights=weights_of(other)))
    monkeypatch.setattr("lungopacity.models.compiled.compile_network", lambda _: translated)
    black_NHW, others_NHW = np.zeros((40, 32, 32), np.uint8), films(40, 32)
    _, said = compiled_if_better(model, black_NHW)
    assert "probabilities differ by up to" not in said
    _, said = compiled_if_better(model, np.concatenate([black_NHW, others_NHW]))
    assert "probabilities differ by up to" in said


def test_what_is_slower_stays_in_torch(monkeypatch):
    model = tiny_model()
    # Five rounds: three seconds compiled, and one in torch.
    seconds = iter([number * 4 + part for number in range(5) for part in (0.0, 3.0, 3.0, 4.0)])
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    assert compiled_if_better(model, films(8, 32)) == (
        None, "CPUs run the network in torch: compiled, it has 0.33 times the speed",
    )  # fmt: skip
    assert next(seconds, None) is None


def test_what_is_faster_is_kept(monkeypatch):
    model = with_distribution(tiny_model(), films(40, 32))
    seconds = iter([number * 4 + part for number in range(5) for part in (0.0, 1.0, 1.0, 4.0)])
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    found, said = compiled_if_better(model, films(8, 32))
    assert found == to_bytes([compile_network(model)])
    assert "3.0 times as fast as in torch" in said
