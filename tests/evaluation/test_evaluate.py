"""Which of the labelled films a finished model is measured on."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from lungopacity.dataset.manifest import assign_splits, read_labels
from lungopacity.errors import UserError
from lungopacity.evaluation.bootstrap import Resampling
from lungopacity.evaluation.evaluate import _check_sound, _scored_images, labels_of_split
from lungopacity.evaluation.measure import ScoredImages, measure
from lungopacity.evaluation.report import EvaluationResult, ModelScores, write_figures
from lungopacity.evaluation.table import metric_value
from lungopacity.storage import open_store
from tests.models.tiny import tiny_model
from tests.training.blobs import blob_films


def labels_of(folder: Path, label: list[str], **columns: list) -> str:
    names = [f"{number}.png" for number in range(len(label))]
    uri = str(folder / "labels.csv")
    pd.DataFrame({"image": names, "label": label, **columns}).to_csv(uri, index=False)
    return uri


def test_a_class_may_be_absent_but_not_all_of_them(tmp_path, caplog):
    uri = labels_of(tmp_path, ["Lung_Opacity", "Not_Normal"], split=["test"] * 2)
    rows = labels_of_split(uri, tiny_model().spec, "test")
    assert rows["label"].tolist() == ["Lung_Opacity"]
    assert "no image of class 'Normal'" in caplog.text
    uri = labels_of(tmp_path, ["normal", "COVID"])
    with pytest.raises(
        UserError, match=r"no image of class 'Normal' or 'Lung_Opacity'; .*; give them the model's"
    ):
        labels_of_split(uri, tiny_model().spec, "all")


def test_scores_that_are_not_numbers_are_refused_with_a_film():
    logits_NK = np.zeros((3, 2), np.float32)
    images = pd.DataFrame({"image": ["a.png", "b.png", "c.png"]})
    _check_sound(ModelScores(logits_NK, logits_NK, None, None), images)
    logits_NK[1, 1] = np.nan
    with pytest.raises(
        UserError, match=r"1 of 3 films are not numbers, such as b\.png: the GPU or"
    ):
        _check_sound(ModelScores(logits_NK, logits_NK, None, None), images)


def test_films_of_one_published_score_are_ranked_alike():
    """`compare`, and whoever reads predictions.parquet, must find the AUC of the report: of scores
    so near to 1 that float32 cannot tell them apart, too."""
    logits_NK = np.array([[0, 20], [0, 24], [0, 18], [0, -3]], np.float32)
    spec = tiny_model().spec
    said = ModelScores(logits_NK, spec.probabilities(logits_NK), None, None)
    p_N = said.probabilities_NK[:, 1]
    assert p_N[:3].tolist() == [1.0] * 3
    films = replace(blob_films(train=4, validation=0, test=0), labels_N=np.array([1, 1, 0, 0]))
    scored = _scored_images(films, said, spec, {"default": spec.operating_point})
    metrics = measure(scored, {}, Resampling.of([None] * 4, 2))
    for name, positive_N in (("Lung_Opacity", [1, 1, 0, 0]), ("Normal", [0, 0, 1, 1])):
        shares_N = said.probabilities_NK[:, spec.class_names.index(name)]
        assert metric_value(metrics, "roc_auc", name) == roc_auc_score(positive_N, shares_N)
    assert metric_value(metrics, "roc_auc", "Lung_Opacity") == 0.75


def test_metrics_before_the_temperature_are_of_the_raw_logits():
    logits_NK = np.array([[2, -1], [0.5, 3]], np.float32)
    spec = tiny_model(temperature=3.0, class_biases=(0.5, -0.5)).spec
    said = ModelScores(logits_NK, spec.probabilities(logits_NK), None, None)
    films = replace(blob_films(train=2, validation=0, test=0), labels_N=np.array([0, 1]))
    scored = _scored_images(films, said, spec, {})
    np.testing.assert_allclose(scored.uncalibrated_NK, softmax(logits_NK, axis=1), rtol=1e-6)
    calibrated_NK = softmax(logits_NK / 3 + [0.5, -0.5], axis=1)
    np.testing.assert_allclose(scored.probabilities_NK, calibrated_NK, rtol=1e-6)


def test_the_confusion_matrix_of_a_report_has_the_true_classes_in_its_rows(tmp_path):
    """Of 2 normal films one is taken for an opacity, of 8 opacities two for normal."""
    labels_N = np.array([0] * 2 + [1] * 8)
    p_N = np.array([0.1, 0.9] + [0.2] * 2 + [0.8] * 6)
    names = ("Normal", "Lung_Opacity")
    scored = ScoredImages(labels_N, np.stack([1 - p_N, p_N], axis=1), names, names[1])
    resampling = Resampling.of([None] * 10, 20)
    result = EvaluationResult(
        "m", "out", "test", 10, 0, 0, 10, 0, "", False, names, names[1], None, "youden", []
    )
    write_figures(open_store(str(tmp_path)), result, scored, resampling, None)
    svg = (tmp_path / "confusion_matrix.svg").read_text()
    assert re.findall(r">([\d.]+%)<", svg) == ["50.0%", "50.0%", "25.0%", "75.0%"]


def test_what_training_made_the_validation_split_is_in_no_other(tmp_path):
    labels = ["Normal", "Lung_Opacity"] * 15
    uri = labels_of(tmp_path, labels, split=["train"] * 20 + ["test"] * 10)
    train, validation, test, every = (
        set(labels_of_split(uri, tiny_model().spec, split)["image"])
        for split in ("train", "validation", "test", "all")
    )
    assert (len(train), len(validation), len(test)) == (16, 4, 10)
    assert train | validation | test == every


def test_the_splits_are_those_of_the_models_training_old_or_new(tmp_path):
    """Until splits were drawn alike for all models, the seed of a training drew its own."""
    uri = labels_of(tmp_path, ["Normal", "Lung_Opacity"] * 40)
    settings = {"settings": {"seed": 3}}
    old, new = (
        tiny_model(training={**settings, "data": data}).spec for data in ({}, {"split_seed": 0})
    )
    bare = read_labels(uri)
    for spec, seed in ((old, 3), (new, 0)):
        drawn = assign_splits(bare, uri, seed)
        expected = set(drawn["image"][drawn["split"] == "test"])
        assert set(labels_of_split(uri, spec, "test")["image"]) == expected
