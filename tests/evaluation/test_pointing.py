import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from lungopacity.evaluation.bootstrap import Resampling
from lungopacity.evaluation.metrics import wilson_interval
from lungopacity.evaluation.pointing import Pointing, peak_of, point, pointing_metrics

FILM = np.full((112, 224), 100, np.uint8)


def map_at(*places: tuple[int, int, float]) -> np.ndarray:
    """Zeros but for these x, y, value."""
    activation = np.zeros(FILM.shape, np.float32)
    for x, y, value in places:
        activation[y, x] = value
    return activation


def boxes(*rows: tuple[float, float, float, float]) -> np.ndarray:
    return np.array(rows, np.float64)


@pytest.mark.parametrize(
    ("x", "y", "hit", "near"),
    [
        (100, 50, True, True),
        (100, 40, True, True),  # its first row
        (100, 39, False, True),
        (100, 60, False, True),  # the row behind its last
        (100, 33, False, True),  # 7.5 pixels are the tolerance
        (100, 31, False, False),
        (135, 50, False, True),  # the second box
        (140, 57, False, True),
        (152, 57, False, False),
        (10, 10, False, False),
    ],
)
def test_the_highest_place_hits_or_misses(x, y, hit, near):
    found = point(
        map_at((x, y, 1), (0, 0, 0.9)), FILM, boxes((90, 40, 40, 20), (138, 40, 6, 20)), 7.5
    )
    expected = hit or (x, y) == (140, 57)
    assert (found.hit, found.hit_with_tolerance) == (expected, near)


def test_energy_and_chance_are_shares():
    film = FILM.copy()
    film[:, 112:] = 7
    film[:, :112] = 8  # the darkest that is not black
    activation = map_at((10, 10, 1.0), (50, 50, 0.5), (200, 100, 0.5))
    # The boxes overlap, and reach beyond the film: each pixel counts once.
    found = point(activation, film, boxes((-20, -20, 76, 132), (28, 0, 28, 112)), 7.5)
    assert found.energy == pytest.approx(0.75)
    assert found.chance == pytest.approx(56 / 224)
    assert found.chance_not_black == pytest.approx(56 / 112)
    assert found.chance_with_tolerance == pytest.approx(64 / 224)


def test_a_map_of_zeros_misses():
    found = point(map_at(), np.zeros_like(FILM), boxes((0, 0, 500, 500)), 7.5)
    assert found == Pointing(False, False, 0.0, 1.0, 1.0, 0.0)
    assert peak_of(map_at()) is None


@pytest.mark.parametrize("place", [(0, 0), (3, 2), (4, 0), (1, 3)])
def test_the_peak_is_in_the_middle_of_the_highest_place_at_the_edge_as_well(place):
    row, column = place
    maps_1155 = torch.zeros(1, 1, 5, 5)
    maps_1155[0, 0, row, column] = 1
    enlarged = interpolate(maps_1155, (160, 160), mode="bilinear")[0, 0].numpy()
    x, y = peak_of(enlarged)
    assert (x, y) == pytest.approx((32 * (column + 0.5), 32 * (row + 0.5)), abs=0.51)


def test_rounding_does_not_move_the_peak_from_the_middle():
    activation = np.ones((5, 5), np.float32)
    activation[0, 0] += np.float32(1.2e-7)
    assert peak_of(activation) == (2.5, 2.5)


def test_metrics_are_shares_and_means_beside_chance():
    films = [
        Pointing(True, True, 0.5, 0.1, 0.2, 0.3),
        Pointing(False, True, 0.25, 0.3, 0.4, 0.5),
        Pointing(False, False, 0.0, 0.2, 0.3, 0.4),
    ]
    resampling = Resampling.of(["a", "b", None])
    metrics = pointing_metrics(films, resampling, "decision=positive")
    found = {metric.metric: metric for metric in metrics}
    game = found["pointing_game"]
    assert (game.value, game.n, game.group) == (1 / 3, 3, "decision=positive")
    assert (game.ci_low, game.ci_high) == wilson_interval(1, 3)
    assert found["energy_in_boxes"].ci_method == "bootstrap"
    assert found["pointing_game_with_tolerance"].value == 2 / 3
    means = {
        "pointing_game_chance": 0.2,
        "pointing_game_with_tolerance_chance": 0.3,
        "pointing_game_chance_not_black": 0.4,
        "energy_in_boxes": 0.25,
    }
    for name, value in means.items():
        assert found[name].value == pytest.approx(value)
    assert pointing_metrics([], Resampling.of([])) == []


def test_films_of_a_patient_count_together_and_every_figure_has_an_interval():
    """Each film four times, as if a patient had four that are all alike."""
    rng = np.random.default_rng(0)
    shares = rng.random((40, 4))
    films = [Pointing(bool(row[0] < 0.5), bool(row[0] < 0.9), *row) for row in shares]
    alone = pointing_metrics(films, Resampling.of([None] * 40))
    four = [film for film in films for _ in range(4)]
    together = pointing_metrics(four, Resampling.of([str(row // 4) for row in range(160)]))
    torn = pointing_metrics(four, Resampling.of([None] * 160))
    for first, second, narrow in zip(alone, together, torn, strict=True):
        bounds = pytest.approx((first.ci_low, first.ci_high), rel=0.01)
        assert (second.ci_low, second.ci_high) == bounds
        assert (second.n, second.patients, second.ci_method) == (160, 40, first.ci_method)
        assert second.ci_low < second.value < second.ci_high
        assert 1.6 < (second.ci_high - second.ci_low) / (narrow.ci_high - narrow.ci_low) < 2.5
    all_hit = pointing_metrics(
        [Pointing(True, True, *shares[0])] * 6, Resampling.of(list("aabbcc"))
    )[0]
    assert all_hit.ci_low == pytest.approx(wilson_interval(3, 3)[0])
    assert all_hit.ci_method == "wilson_effective"
