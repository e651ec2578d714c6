from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lungopacity.errors import UserError
from lungopacity.models import NETWORK_NAMES, build_network
from lungopacity.training import AugmentationSettings, TrainingSettings
from lungopacity.training.catalogue import field_texts, networks_table, recipe_table
from lungopacity.training.settings import recipe, with_words
from lungopacity.training.task import TrainingTask, training_task, warn_of_no_effect


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("workers", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("batch_size", 1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("mixup_alpha", float("inf")),
        ("weight_decay", -0.1),
        ("gradient_clip", -1.0),
        ("warmup_fraction", 1.0),
        ("label_smoothing", 1.0),
        ("patience", -1),
        ("precision", "float8"),
        ("class_balance", "maybe"),
        ("mixup_alpha", -0.1),
        ("ema_decay", 1.0),
        ("frozen_epochs", -1),
    ],
)
def test_refuses_what_no_run_can_use(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        TrainingSettings(**{name: value})  # type: ignore[arg-type]


def test_refuses_a_batch_that_workers_cannot_share() -> None:
    with pytest.raises(ValueError, match="multiple of workers"):
        TrainingSettings(batch_size=32, workers=3)
    with pytest.raises(ValueError, match="batch_size 4 must be at least two films for each of 4"):
        TrainingSettings(batch_size=4, workers=4)


def test_refuses_amounts_that_are_not_finite_in_its_parts() -> None:
    for words in ({"augmentation.gamma": "Infinity"}, {"preprocessing.mean": "NaN"}):
        with pytest.raises(ValueError, match="must be a finite number"):
            with_words(TrainingSettings(), words)


def test_every_setting_can_be_written_as_json() -> None:
    document = json.loads(json.dumps(TrainingSettings(model_settings={"dropout": 0.1}).as_json()))
    assert document["model_settings"] == {"dropout": 0.1}
    assert document["augmentation"]["rotation_degrees"] > 0
    assert document["preprocessing"]["image_size"] > 0


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ({"learning_rate": "1e-4"}, "learning_rate", 1e-4),
        ({"weight_decay": "0"}, "weight_decay", 0.0),
        ({"decay_kernels_only": "true"}, "decay_kernels_only", True),
        ({"patience": "3"}, "patience", 3),
        ({"class_balance": "weights"}, "class_balance", "weights"),
        ({"model_settings.channels": "[4, 8]"}, "model_settings", {"channels": [4, 8]}),
    ],
)
def test_a_setting_is_changed_by_its_name(words, name, value) -> None:
    assert getattr(with_words(TrainingSettings(), words), name) == value


def test_settings_inside_parts_are_changed() -> None:
    words = {"augmentation.flip_probability": "0", "preprocessing.mean": "0.4"}
    changed = with_words(TrainingSettings(), words)
    assert changed.augmentation == AugmentationSettings(flip_probability=0.0)
    assert changed.preprocessing.mean == 0.4


def test_it_does_not_matter_which_change_comes_first() -> None:
    words = {"workers": "3", "batch_size": "33", "augmentation.scale": "0.5"}
    for given in (words, dict(reversed(words.items()))):
        changed = with_words(TrainingSettings(), given)
        assert (changed.workers, changed.batch_size) == (3, 33)
        assert changed.augmentation.scale == 0.5
    changed = with_words(
        TrainingSettings(),
        {"batch_size": "33", "preprocessing.std": "0.5"},
        {"workers": 3, "preprocessing": {"image_size": 64, "std": 0.3}},
    )
    assert (changed.workers, changed.batch_size) == (3, 33)
    assert (changed.preprocessing.image_size, changed.preprocessing.std) == (64, 0.5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"rate": "1"}, "no setting 'rate'; the settings are augmentation"),
        ({"model": "alexnet"}, "no setting 'model'"),
        ({"patience": "1.5"}, "patience must be a whole number, such as 3, not '1.5'"),
        ({"patience": "x"}, "patience must be a whole number, such as 3, not 'x'"),
        ({"mixup_alpha": ".5"}, "mixup_alpha must be a number, such as 0.5 or 1e-3, not '.5'"),
        ({"mixup_alpha": "9" * 400}, "mixup_alpha must be a number"),
        ({"decay_kernels_only": "True"}, "decay_kernels_only must be true or false, not 'True'"),
        ({"use_gpu": "1"}, "use_gpu must be true or false"),
        (
            {"model_settings.channels": "8,16"},
            r"channels must be JSON, such as 3, 0.5, true, \[8, 16",
        ),
        ({"augmentation": "none"}, "one of its parts, such as augmentation.rotation_degrees"),
        ({"preprocessing": "none"}, "one of its parts, such as preprocessing.image_size"),
        ({"model_settings": "{}"}, "such as model_settings.dropout"),
        ({"augmentation.size": "1"}, "no setting 'augmentation.size'"),
        ({"epochs.more": "1"}, "epochs has no parts"),
        ({"learning_rate": "-1"}, "learning_rate must be above 0"),
        (
            {"augmentation.erase_probability": "2"},
            r"^augmentation.erase_probability must be from 0",
        ),
        ({"preprocessing.std": "x"}, "^set: preprocessing.std must be a number"),
    ],
)
def test_a_word_of_the_wrong_type_is_refused(words, said) -> None:
    with pytest.raises(ValueError, match=said):
        with_words(TrainingSettings(), words)


@pytest.mark.parametrize("name", NETWORK_NAMES)
def test_every_network_has_a_recipe_that_builds_it(name) -> None:
    settings = recipe(name)
    assert settings.model == name
    build_network(name, 2, settings.model_settings)
    assert settings.weights == ("imagenet" if name.startswith("efficientnet") else "none")


def test_every_setting_is_explained_where_it_is_defined() -> None:
    for kind in (TrainingSettings, AugmentationSettings):
        assert set(field_texts(kind)) == set(kind.__dataclass_fields__)
    table = recipe_table("efficientnet-lite0")
    assert "weights = imagenet" in table
    assert "augmentation.flip_probability = 0.5\n    Share of films mirrored" in table
    assert "model_settings.drop_path = 0.1" in table


@pytest.mark.parametrize("name", ["classical-cnn", "cov-net", "efficientnet-lite0"])
def test_the_settings_are_shown_as_set_takes_them(name) -> None:
    lines = [line for line in recipe_table(name).splitlines()[2:] if not line.startswith(" ")]
    words = dict(line.split(" = ", 1) for line in lines)
    assert not {"model", "use_gpu"} & set(words)
    chosen = with_words(recipe(name), words)
    assert replace(chosen, model_settings=recipe(name).model_settings) == recipe(name)
    with torch.device("meta"):
        own, ours = (
            build_network(name, 2, settings.model_settings).settings
            for settings in (recipe(name), chosen)
        )
    assert own == ours


def test_the_networks_are_listed_with_their_number_of_parameters() -> None:
    lines = networks_table().splitlines()
    row = next(line for line in lines if line.startswith("resnet-50"))
    assert row.split()[1:5] == ["23,505,858", "224", "x", "224"]
    assert "arXiv:1512.03385" in row
    assert len(lines) == 1 + len(NETWORK_NAMES) + 3
    (of_several,) = [line for line in lines if line.startswith("ensemble")]
    assert "`lungopacity ensemble --model FIRST" in of_several
    assert recipe_table("ensemble") == of_several
    with pytest.raises(UserError, match=r"'ensemble' is not trained: it averages .* makes one"):
        recipe("ensemble")


def test_the_recipe_of_an_unknown_network_is_refused() -> None:
    with pytest.raises(UserError, match="unknown model 'lenet'"):
        recipe_table("lenet")


def task(
    tmp_path: Path,
    model: str,
    image_size: int | None = None,
    classes: Sequence[str] = ("Normal", "Lung_Opacity"),
    **words: str,
) -> TrainingTask:
    """A task whose films do not exist, because none is read."""
    labels = tmp_path / "labels.csv"
    rows = [f"{n}.png,{('Normal', 'Lung_Opacity')[n % 2]}" for n in range(40)]
    labels.write_text("\n".join(["image,label", *rows]))
    return training_task(
        [str(tmp_path / "films")],
        str(labels),
        model=model,
        classes=classes,
        positive_class=None,
        image_size=image_size,
        options={"workers": 1},
        words={name.replace("__", "."): word for name, word in words.items()},
        accept=(),
        reject_quality=None,
    )


@pytest.mark.parametrize(
    ("model", "size", "words", "said"),
    [
        ("classical-cnn", None, {"model_settings__dropout": "2"}, "from 0 to below 1, not 2; see"),
        (
            "classical-cnn",
            None,
            {"model_settings__dropot": "0.2"},
            "has no setting 'dropot'; see `lung",
        ),
        ("resnet-50", None, {"model_settings__drop_path": "1"}, "drop_path must be from 0"),
        ("cov-net", None, {"model_settings__channels": "8"},
         "channels must be a list of whole numbers, such as [32, 64, 128, 256], not 8; see `lung"),
        ("cov-net", None, {"model_settings__dilations": "[1, 2.5]"},
         "dilations must be a list of whole numbers, such as [1, 2, 4], not [1, 2.5]"),
        ("cov-net", None, {"model_settings__squeeze": "null"}, "whole number, such as 8, not null"),
        # Otherwise the text would count as true, because it is not empty.
        ("classical-cnn", None, {"model_settings__batch_norm": '"false"'},
         'batch_norm must be true or false, not "false"'),
        ("classical-cnn", None, {"model_settings__hidden_units": "64.0"},
         "hidden_units must be a whole number, such as 0, not 64.0"),
        # It fits no machine.
        ("classical-cnn", None, {"model_settings__hidden_units": f"{10**11}"},
         " weights need 191,852 GiB of memory, and this machine has "),
        ("alexnet", None, {"model_settings__dropout": "[0.5]"},
         "dropout must be a number, such as 0.2, not [0.5]"),
        ("torchvision:vit_b_32", None, {"model_settings__image_size": "[64, 64]"},
         "image_size must be a whole number, not [64, 64]"),
        ("torchvision:vit_b_32", 100, {}, "--image-size 100: Input shape indivisible"),
        # It can be built, but its last maps would have no pixel.
        ("alexnet", 32, {}, "--image-size 32: Given input size: (256x1x1)"),
        ("classical-cnn", None, {"use_gpu": "true"}, "--set: use_gpu is chosen by --use-gpu and"),
        ("classical-cnn", None, {"batch_size": "1"}, "at least two films for each of 1 worker"),
        ("classical-cnn", None, {"seed": "4294967296"}, "--seed must be from 0 to 4294967295"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_before_a_film_is_read(
    tmp_path, model, size, words, said
) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        task(tmp_path, model, size, **words)
    for name, word in words.items():
        if name.startswith("model_settings"):
            assert str(refused.value).startswith(f"--set {name.replace('__', '.')}={word}: ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"augmentation__erase_fraction": "0.3", "augmentation__erase_probability": "0.5"}, []),
        ({"epochs": "10", "patience": "8"}, []),
        (
            {"augmentation__erase_fraction": "0.3"},
            ["--set augmentation.erase_fraction=0.3 has no effect while "
             "augmentation.erase_probability is 0"],
        ),
        (
            {"epochs": "10", "patience": "9"},
            ["--set patience=9 has no effect: training ends after 10 epochs anyway"],
        ),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_told(tmp_path, caplog, words, told) -> None:
    asked = task(tmp_path, "classical-cnn", **words)
    caplog.clear()
    warn_of_no_effect(asked)
    assert caplog.messages == told


def test_networks_that_need_memory_or_a_fixed_size_are_checked_too(tmp_path) -> None:
    assert task(tmp_path, "torchvision:regnet_x_400mf").settings.model.endswith("400mf")
    vit = task(tmp_path, "torchvision:vit_b_32", 64, model_settings__dropout="0.5")
    assert vit.settings.model_settings == {"image_size": 64, "dropout": 0.5}
    with pytest.raises(UserError, match="--image-size 64: Wrong image height! Expected 96 but got"):
        task(tmp_path, "torchvision:vit_b_32", 64, model_settings__image_size="96")


@pytest.mark.parametrize(
    ("classes", "positive"),
    [
        (("Lung_Opacity", "Normal"), "Lung_Opacity"),
        (("Normal=Healthy", "Lung_Opacity=Ill"), "Ill"),
        (("Lung_Opacity=Ill", "Normal=Healthy"), "Healthy"),
    ],
)
def test_decisions_are_about_lung_opacity_or_the_last_class(tmp_path, classes, positive) -> None:
    assert task(tmp_path, "classical-cnn", classes=classes).settings.positive_class == positive


def test_the_seed_does_not_change_the_split(tmp_path) -> None:
    """Models of all seeds then have one test set, and can be averaged."""
    first, other = (task(tmp_path, "classical-cnn", seed=word) for word in ("0", "1"))
    assert (first.settings.seed, other.settings.seed) == (0, 1)
    assert first.frame.equals(other.frame)
    assert set(first.frame["split"]) == {"train", "validation"}
