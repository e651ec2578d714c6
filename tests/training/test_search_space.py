from __future__ import annotations

import pyarrow as pa
import pytest

import lungopacity.training.search_space as spaces
from lungopacity.models import NETWORK_NAMES
from lungopacity.training.search_space import default_space, draw, parse_domain, search_space
from lungopacity.training.settings import TrainingSettings, recipe, with_words


@pytest.mark.parametrize(
    ("text", "kind", "low", "high"),
    [
        ("log:1e-4:1e-2", pa.float64(), 1e-4, 1e-2),
        ("uniform:0:0.3", pa.float64(), 0, 0.3),
        ("int:4:6", pa.int64(), 4, 6),
        ("choice:0,0.2", pa.float64(), 0, 0.2),
    ],
)
def test_draws_stay_within_their_ends_and_come_close_to_them(text, kind, low, high) -> None:
    space = {"it": parse_domain(text)}
    drawn = [float(draw(space, 0, trial)["it"]) for trial in range(1, 200)]
    assert low <= min(drawn) <= low + 0.1 * (high - low)
    assert high - 0.2 * (high - low) <= max(drawn) <= high
    assert space["it"].arrow_type == kind
    if text.startswith("log"):
        assert sum(value < 1e-3 for value in drawn) == pytest.approx(100, abs=25)


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"rate": "log:1:2"}, "no setting 'rate'"),
        ({"learning_rate": "log:0:2"}, "'log:0:2' is none of log:LOW:HIGH"),
        ({"learning_rate": "log:1:0.1"}, "with LOW below HIGH, and above 0 for log"),
        ({"learning_rate": "log:2:1"}, "is none of"),
        ({"learning_rate": "about 1"}, "is none of"),
        ({"epochs": "int:1.5:2"}, "is none of"),
        ({"mixup_alpha": "choice:"}, "is none of"),
        ({"epochs": "uniform:1.5:2"}, "epochs: 'uniform:1.5:2' draws fractions; give int:1:2"),
        ({"batch_size": "log:8:64"}, "give int:8:64"),
        ({"model_settings.hidden_units": "uniform:0:128"}, "give int:0:128"),
        ({"model_settings.hidden_units": "choice:0,0.5"}, "hidden_units must be a whole number"),
        ({"model_settings.droput": "uniform:0:0.5"}, "classical-cnn has no setting 'droput'"),
        ({"model_settings.dropout": "choice:0.1,2"}, "dropout must be from 0 to below 1, not 2"),
        ({"label_smoothing": "uniform:0:1"}, "label_smoothing must be from 0 to below 1"),
        ({"class_balance": "choice:none,much"}, "class_balance must be one of"),
        ({"preprocessing.image_size": "choice:64,96"}, "the same in all trials"),
        ({"model_settings.image_size": "choice:64,96"}, "the same in all trials"),
        ({"seed": "int:0:9"}, "the same in all trials"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(search, said) -> None:
    with pytest.raises(ValueError, match=said):
        search_space(TrainingSettings(), search)


@pytest.mark.parametrize("name", NETWORK_NAMES)
def test_every_network_has_a_space_that_fits_its_recipe(name) -> None:
    settings = recipe(name)
    space = search_space(settings, {})
    assert set(space) == set(default_space(name))
    for trial in range(1, 6):
        with_words(settings, draw(space, 0, trial))


def test_the_spaces_of_the_networks_are_tried_on_them(monkeypatch) -> None:
    wrong = {**default_space("cov-net"), "model_settings.droput": "uniform:0:0.5"}
    monkeypatch.setattr(spaces, "_FRESH", wrong)
    with pytest.raises(ValueError, match=r"model_settings\.droput"):
        search_space(recipe("cov-net"), {})


def test_what_is_drawn_does_not_depend_on_the_order_of_the_options() -> None:
    search = {"learning_rate": "log:1e-4:1e-2", "label_smoothing": "uniform:0:0.3"}
    spaces = [
        search_space(TrainingSettings(), dict(given))
        for given in (search.items(), reversed(search.items()))
    ]
    assert draw(spaces[0], 0, 3) == draw(spaces[1], 0, 3)


def test_each_seed_and_trial_draws_its_own() -> None:
    space = {"it": parse_domain("uniform:0:1")}
    drawn = {draw(space, seed, trial)["it"] for seed in (0, 1, 2) for trial in (1, 2, 3)}
    assert len(drawn) == 9
