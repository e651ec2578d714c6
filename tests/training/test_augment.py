from __future__ import annotations

import math

import pytest
import torch

from lungopacity.training.augment import augment
from lungopacity.training.settings import AugmentationSettings

NOTHING = AugmentationSettings(
    rotation_degrees=0, scale=0, shift=0, gain=0, gamma=0, flip_probability=0
)


def films(count: int = 6, height: int = 40, width: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, height, width), generator=generator, dtype=torch.uint8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_changes_nothing_at_zero_strength() -> None:
    assert torch.equal(augment(films(), NOTHING, generator()), films())


@pytest.mark.parametrize(("height", "width"), [(40, 40), (33, 48)])
def test_keeps_type_and_shape_and_uses_the_range(height: int, width: int) -> None:
    strong = AugmentationSettings(90, 0.5, 0.3, 0.9, 1.0, 0.5)
    changed_BHW = augment(films(height=height, width=width), strong, generator())
    assert changed_BHW.dtype == torch.uint8
    assert changed_BHW.shape == (6, height, width)
    assert changed_BHW.max() > 200


def test_does_not_change_its_input() -> None:
    original_BHW = films()
    augment(original_BHW, AugmentationSettings(), generator())
    assert torch.equal(original_BHW, films())


def test_the_same_seed_draws_the_same_and_each_film_its_own() -> None:
    twins_BHW = films(1).expand(2, -1, -1)
    first = augment(twins_BHW, AugmentationSettings(), generator(3))
    assert torch.equal(first, augment(twins_BHW, AugmentationSettings(), generator(3)))
    assert not torch.equal(first, augment(twins_BHW, AugmentationSettings(), generator(4)))
    assert not torch.equal(first[0], first[1])


def test_mirrors_every_film_at_flip_probability_one() -> None:
    flip = AugmentationSettings(0, 0, 0, 0, 0, flip_probability=1)
    assert torch.equal(augment(films(), flip, generator()), films().flip(2))


def test_gamma_is_the_logarithm_of_an_exponent() -> None:
    only_gamma = AugmentationSettings(0, 0, 0, gain=0, gamma=1.0)
    changed_BHW = augment(torch.full((200, 4, 4), 100, dtype=torch.uint8), only_gamma, generator())
    exponent_B = (changed_BHW[:, 0, 0] / 255).log() / math.log(100 / 255)
    assert -1.05 < exponent_B.log().min() < -0.9 < 0.9 < exponent_B.log().max() < 1.05


def test_brightness_and_contrast_leave_black_black() -> None:
    only_grey = AugmentationSettings(0, 0, 0, gain=0.5, gamma=0.5)
    black_BHW = torch.zeros(4, 32, 32, dtype=torch.uint8)
    assert torch.equal(augment(black_BHW, only_grey, generator()), black_BHW)


def test_a_shift_moves_by_at_most_its_share_of_the_side() -> None:
    film_BHW = torch.zeros(64, 41, 41, dtype=torch.uint8)
    film_BHW[:, 20, 20] = 255
    moved_BHW = augment(film_BHW, AugmentationSettings(0, 0, 0.1, 0, 0), generator())
    brightest = moved_BHW.flatten(1).argmax(1)
    rows, columns = brightest // 41 - 20, brightest % 41 - 20
    assert 3 <= rows.abs().max() <= 5
    assert 3 <= columns.abs().max() <= 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rotation_degrees", -1),
        ("gamma", -0.1),
        ("scale", 1),
        ("shift", -1),
        ("gain", 1),
        ("flip_probability", 1.1),
    ],
)
def test_refuses_impossible_strengths(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        AugmentationSettings(**{name: value})


def test_erases_one_rectangle_of_a_share_of_the_films() -> None:
    erasing = AugmentationSettings(0, 0, 0, 0, 0, 0, erase_probability=0.5, erase_fraction=0.2)
    white_BHW = torch.full((400, 40, 60), 255, dtype=torch.uint8)
    black_BHW = augment(white_BHW, erasing, generator()) == 0
    area_B = black_BHW.float().mean(dim=(1, 2))
    assert 0.4 < (area_B > 0).float().mean() < 0.6
    assert 0.15 < area_B.max() <= 0.21
    for film_HW in black_BHW[area_B > 0]:
        rows, columns = film_HW.any(1).sum(), film_HW.any(0).sum()
        assert film_HW.sum() == rows * columns  # a rectangle is full
        assert film_HW.any(1).nonzero().diff(dim=0).eq(1).all()
