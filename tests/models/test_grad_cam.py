"""Class activation maps of networks whose correct map is known, and of every network."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from lungopacity.errors import UserError
from lungopacity.evaluation.pointing import peak_of
from lungopacity.models import NETWORK_NAMES, ModelSpec, OperatingPoint, TrainedModel, build_network
from lungopacity.models.ensemble_settings import EnsembleMember
from lungopacity.models.grad_cam import GradCAM, log_odds
from lungopacity.models.networks import network_card
from lungopacity.models.normalise import normalise
from lungopacity.models.scorer import Scorer
from lungopacity.radiograph import Preprocessing
from tests.models.tiny import tiny_model, weights_of
from tests.training.blobs import blob_films

OTHERS = ("squeezenet1_1", "swin_t", "vit_b_16", "mobilenet_v3_small")


class BrightSpots(nn.Module):
    """Has one map for bright places, which support class 1, and one for dark places (class 0)."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(8)
        self.maps = nn.Conv2d(1, 2, 1)
        self.last = last
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            self.maps.weight.copy_(torch.tensor([[[[1.0]]], [[[-1.0]]]]))
            self.maps.bias.copy_(torch.tensor([-0.5, 0.0]))
            self.head.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))

    def forward(self, x_B1HW: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.maps(self.pool(x_B1HW))).mean(dim=(2, 3)))


def spots() -> torch.Tensor:
    """A bright spot and, elsewhere, a dark one."""
    x_B1HW = torch.zeros(1, 1, 64, 64)
    x_B1HW[0, 0, 8:16, 40:48] = 2.0
    x_B1HW[0, 0, 48:56, 16:24] = -2.0
    return x_B1HW


@pytest.mark.parametrize("inplace", [True, False])
def test_a_network_built_by_hand_gives_the_known_map(inplace):
    network = BrightSpots(nn.ReLU(inplace=inplace)).eval()
    (map_HW,) = GradCAM(network, 1, 64).maps(spots()).numpy()
    # The bright map has the weight 1/64, the dark one -1/64; negative values are cut off.
    x, y = peak_of(map_HW)
    assert (40 < x < 48, 8 < y < 16) == (True, True)
    assert map_HW[52, 20] == 0
    assert map_HW.max() == 1
    (other_HW,) = GradCAM(network, 0, 64).maps(spots()).numpy()
    x, y = peak_of(other_HW)
    assert (16 < x < 24, 48 < y < 56) == (True, True)


def test_where_nothing_supports_the_class_the_map_is_zero():
    network = BrightSpots(nn.ReLU()).eval()
    x_B1HW = spots().clamp(max=0)
    map_BHW = GradCAM(network, 1, 64).maps(torch.cat([x_B1HW, spots()]))
    assert map_BHW.amax(dim=(1, 2)).tolist() == [0, 1]


def test_the_log_odds_are_those_of_the_softmax():
    logits_BK = torch.randn(5, 3)
    p_B = logits_BK.softmax(dim=1)[:, 2]
    torch.testing.assert_close(log_odds(logits_BK, 2), torch.log(p_B / (1 - p_B)))


def test_evidence_against_the_other_class_counts_too():
    """All evidence is in the other logit; the decision is the same."""
    network = BrightSpots(nn.ReLU()).eval()
    with torch.no_grad():
        network.head.weight.copy_(torch.tensor([[-1.0, 1.0], [0.0, 0.0]]))
    x, y = peak_of(GradCAM(network, 1, 64).maps(spots())[0].numpy())
    assert (40 < x < 48, 8 < y < 16) == (True, True)


def test_a_network_without_feature_maps_is_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64 * 64, 2)).eval()
    with pytest.raises(UserError, match=r"needs feature maps .* \(input of 64 pixels\)"):
        GradCAM(network, 1, 64)


def test_the_map_is_of_the_calibrated_probability():
    """Temperature and biases change how much each other class counts."""
    torch.manual_seed(0)
    network = build_network("classical-cnn", 3, {}).eval()
    last = network.head[-1]
    last.weight.data *= 20
    x_B1HW = torch.randn(8, 1, 64, 64)

    def maps(*calibration) -> torch.Tensor:
        return torch.stack([GradCAM(network, k, 64, *calibration).maps(x_B1HW) for k in range(3)])

    raw, found = maps(), maps(0.5, (4.0, 0.0, -4.0))
    last.weight.data /= 0.5
    last.bias.data = last.bias.data / 0.5 + torch.tensor([4.0, 0.0, -4.0])
    torch.testing.assert_close(found, maps())
    assert (found - raw).abs().max() > 0.05


def test_a_models_map_is_of_its_calibration():
    classes, calibration = ("A", "B", "Lung_Opacity"), (0.5, (4.0, 0.0, -4.0))
    changes = {"class_names": classes, "temperature": 0.5, "class_biases": calibration[1]}
    model = tiny_model(seed=1, image_size=64, **changes)
    pixels_BHW = np.random.default_rng(0).integers(0, 256, (4, 64, 64), dtype=np.uint8)
    x_B1HW = normalise(torch.from_numpy(pixels_BHW), model.spec.preprocessing)
    expected, raw = (
        GradCAM(model.network(), 2, 64, *given).maps(x_B1HW).numpy() for given in (calibration, ())
    )
    found = Scorer(model).activation_maps(pixels_BHW)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - raw).max() > 0.2


@pytest.mark.parametrize("name", [*NETWORK_NAMES, *(f"torchvision:{name}" for name in OTHERS)])
def test_every_network_gives_maps(name):
    torch.manual_seed(0)
    settings = {"image_size": 64} if network_card(name).fixed_size else {}
    network = build_network(name, 3, settings).eval()
    x_B1HW = torch.randn(2, 1, 64, 64)
    maps = torch.stack([GradCAM(network, index, 64).maps(x_B1HW) for index in range(3)])
    assert maps.shape == (3, 2, 64, 64)
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()
    # Something supports at least one class, and not equally everywhere.
    highest = maps.amax(dim=(2, 3))
    assert set(highest.flatten().tolist()) <= {0.0, 1.0}
    assert (highest == 1).any()
    assert (maps[highest == 1].amin(dim=(1, 2)) < 0.9).all()
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_an_untrained_network_gives_each_film_its_own_map():
    torch.manual_seed(3)
    network = build_network("efficientnet-lite0", 2).eval()
    cam = GradCAM(network, 1, 64)
    x_B1HW = torch.randn(2, 1, 64, 64)
    both = cam.maps(x_B1HW)
    torch.testing.assert_close(cam.maps(x_B1HW[1:])[0], both[1], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(both[0], both[1], atol=0.05)


@pytest.fixture(scope="module")
def trained() -> TrainedModel:
    """A network that has learnt to see blobs, in a second."""
    films = blob_films(train=256)
    torch.manual_seed(0)
    settings = {"channels": (8, 16, 16), "convolutions": (1, 1, 1)}
    network = build_network("classical-cnn", 2, settings)
    x_B1HW = (torch.from_numpy(films.pixels_NHW[:256]).unsqueeze(1) / 255.0 - 0.5) / 0.25
    labels_B = torch.from_numpy(films.labels_N[:256])
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x_B1HW), labels_B).backward()
        optimizer.step()
    spec = ModelSpec(
        architecture="classical-cnn",
        architecture_settings=asdict(network.settings),
        class_names=films.class_names,
        positive_class="Lung_Opacity",
        preprocessing=Preprocessing(image_size=32),
        operating_point=OperatingPoint(0.5),
    )
    return TrainedModel(spec, weights_of(network))


def blobs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unseen films with a blob, and where it is: its x and its y, found by smoothing."""
    films = blob_films(train=256)
    pixels_NHW = films.pixels_NHW[256:][films.labels_N[256:] == 1]
    smooth = nn.functional.avg_pool2d(
        torch.from_numpy(pixels_NHW).unsqueeze(1).float(), 7, stride=1, padding=3
    )
    place = smooth.flatten(1).argmax(dim=1).numpy()
    return pixels_NHW, place % 32, place // 32


def misses(maps_NHW: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    peaks = np.array([peak_of(map_HW) or (np.inf, np.inf) for map_HW in maps_NHW])
    return np.hypot(peaks[:, 0] - x - 0.5, peaks[:, 1] - y - 0.5)


def test_a_trained_network_points_at_the_blob(trained):
    pixels_NHW, x, y = blobs()
    scorer = Scorer(trained)
    before = scorer.logits(pixels_NHW)
    maps_NHW = scorer.activation_maps(pixels_NHW, batch_size=7)
    assert maps_NHW.shape == pixels_NHW.shape
    assert (maps_NHW.min(), maps_NHW.max()) == (0, 1)
    # Cells are 8 pixels wide. A random point of the film would miss by 11 pixels on average.
    assert np.median(misses(maps_NHW, x, y)) < 5
    assert (misses(maps_NHW, x, y) < 8).mean() > 0.8
    np.testing.assert_array_equal(scorer.logits(pixels_NHW), before)
    assert scorer.activation_maps(pixels_NHW[:0]).shape == (0, 32, 32)


def test_an_ensembles_map_is_the_mean_of_its_members(trained):
    other = tiny_model(seed=4, image_size=40)
    members = [
        EnsembleMember(
            model_id=model.model_id,
            architecture=model.spec.architecture,
            architecture_settings=model.spec.architecture_settings,
            image_size=model.spec.preprocessing.image_size,
            mean=model.spec.preprocessing.mean,
            std=model.spec.preprocessing.std,
            temperature=1.0,
            features=model.network().describe(torch.zeros(1, 1, 40, 40)).shape[1],
        )
        for model in (trained, other)
    ]
    settings = {"members": [asdict(member) for member in members]}
    network = build_network("ensemble", 2, settings)
    for part, model in zip(network.members, (trained, other), strict=True):
        part.load_state_dict(model.network().state_dict())
    spec = ModelSpec(
        architecture="ensemble",
        architecture_settings=settings,
        class_names=trained.spec.class_names,
        positive_class="Lung_Opacity",
        preprocessing=Preprocessing(image_size=40, mean=0.0, std=1.0),
        operating_point=OperatingPoint(0.5),
    )
    films = np.random.default_rng(0).integers(0, 256, (3, 40, 40)).astype(np.uint8)
    maps_NHW = Scorer(TrainedModel(spec, weights_of(network))).activation_maps(films)
    assert maps_NHW.shape == (3, 40, 40)
    grey_N1HW = torch.from_numpy(films).unsqueeze(1) / 255
    small = nn.functional.interpolate(grey_N1HW, (32, 32), mode="bilinear", antialias=True)
    of_trained = GradCAM(trained.network(), 1, 32).maps((small - 0.5) / 0.25)
    enlarged = nn.functional.interpolate(of_trained.unsqueeze(1), (40, 40), mode="bilinear")
    of_other = GradCAM(other.network(), 1, 40).maps((grey_N1HW - 0.5) / 0.25)
    mean = (enlarged.squeeze(1) + of_other) / 2
    expected = mean / mean.amax(dim=(1, 2), keepdim=True)
    np.testing.assert_allclose(maps_NHW, expected.numpy(), atol=1e-3)
