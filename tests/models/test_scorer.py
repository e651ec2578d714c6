import numpy as np
import pytest
import torch

from lungopacity.errors import UserError
from lungopacity.models import NETWORK_NAMES
from lungopacity.models.normalise import normalise
from lungopacity.models.scorer import Scorer, check_precision
from tests.models.tiny import tiny_model

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 32, 32), dtype=np.uint8)


def test_the_batch_size_does_not_change_a_score():
    scorer = Scorer(tiny_model())
    np.testing.assert_allclose(
        scorer.logits(PIXELS, batch_size=7), scorer.logits(PIXELS, batch_size=2), atol=1e-5
    )


def test_no_image_gives_no_score():
    assert Scorer(tiny_model()).logits(PIXELS[:0]).shape == (0, 2)


def test_probabilities_are_the_softmax_over_the_temperature():
    # The exponentials of the last ones overflow float64.
    logits = np.array([[2.0, -1.0], [80.0, -900.0], [4000.0, 3998.0]], np.float32)
    found = Scorer(tiny_model(temperature=2.0)).probabilities(logits)
    expected = torch.softmax(torch.tensor(logits) / 2.0, dim=1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-7)
    np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=1e-6)


def test_in_bfloat16_scores_move_a_little():
    """Tested on the CPU, in place of a GPU."""
    exact, scorer = Scorer(tiny_model()), Scorer(tiny_model(), precision="bfloat16")
    expected, found = exact.scores(PIXELS), scorer.scores(PIXELS)
    assert {found.logits_NK.dtype, found.features_NF.dtype} == {np.dtype(np.float32)}
    moved = np.abs(scorer.probabilities(found.logits_NK) - exact.probabilities(expected.logits_NK))
    assert 0 < moved.max() < 0.02
    # The last 16 bits of a bfloat16 layer's output would be zeros.
    assert np.any(found.logits_NK.view(np.uint32) & 0xFFFF)


@pytest.mark.parametrize("name", ["classical-cnn", "cov-net", "efficientnet-lite0"])
def test_bfloat16_is_what_autocast_makes_of_the_network(name):
    model = tiny_model(architecture=name)
    scorer = Scorer(model, precision="bfloat16")
    x_N1HW = normalise(torch.from_numpy(PIXELS), model.spec.preprocessing)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected_NF = scorer.network.describe(x_N1HW).float()
    np.testing.assert_array_equal(scorer.scores(PIXELS).features_NF, expected_NF.numpy())
    assert {tensor.dtype for tensor in scorer.network.parameters()} == {torch.float32}
    scorer.activation_maps(PIXELS[:1])


def test_float32_on_a_gpu_is_not_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(Scorer, "_device", torch.device("cpu"))
    Scorer(tiny_model())
    assert torch.backends.cudnn.allow_tf32
    Scorer(tiny_model(), use_gpu=True)
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("precision", "use_gpu", "said"),
    [
        ("float16", True, "--precision: 'float16' is none of float32, bfloat16"),
        ("bfloat16", False, "bfloat16 needs a GPU; use one, or give --precision float32"),
    ],
)
def test_a_precision_that_is_unknown_or_unsupported_is_refused(precision, use_gpu, said):
    with pytest.raises(UserError, match=said):
        check_precision(precision, use_gpu)
    check_precision("float32", use_gpu)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", NETWORK_NAMES)
def test_a_gpu_scores_as_the_cpu_does(name):
    """TF32 would be off by a thousandth, and bfloat16 is by more."""
    model = tiny_model(architecture=name, image_size=64)
    films_NHW = np.random.default_rng(0).integers(0, 256, (9, 64, 64), dtype=np.uint8)
    on_cpu = Scorer(model).scores(films_NHW)
    size = np.abs(on_cpu.features_NF).max()
    for precision, off, p_off in (("float32", 1e-4, 1e-4), ("bfloat16", 0.05, 0.02)):
        scorer = Scorer(model, use_gpu=True, precision=precision)
        on_gpu = scorer.scores(films_NHW, batch_size=4)
        np.testing.assert_allclose(
            on_gpu.features_NF, on_cpu.features_NF, rtol=0, atol=off * size, err_msg=precision
        )
        p_NK, expected_NK = map(scorer.probabilities, (on_gpu.logits_NK, on_cpu.logits_NK))
        np.testing.assert_allclose(p_NK, expected_NK, rtol=0, atol=p_off, err_msg=precision)
