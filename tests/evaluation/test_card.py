"""The model card tells what was measured, and what only people can tell."""

from __future__ import annotations

from dataclasses import replace

from lungopacity.evaluation.card import model_card
from lungopacity.evaluation.metrics import Metric
from lungopacity.models import OperatingPoint
from tests.models.tiny import tiny_model

METRICS = [
    Metric("all", "accuracy", None, 0.9123, 0.9, 0.92, 798),
    Metric("all", "roc_auc", "Lung_Opacity", 0.9765, 0.97, 0.98, 798),
    Metric("all", "recall", "Normal", float("nan"), None, None, 0),
    Metric("all", "decision_sensitivity", "sensitivity=0.95", 0.951, 0.92, 0.97, 331),
    Metric("view_position=PA", "roc_auc", "Lung_Opacity", 0.9412, 0.92, 0.96, 440),
    Metric("view_position=PA", "roc_auc", "Normal", 0.1, None, None, 440),
]


def test_the_card_tells_what_was_measured():
    spec = replace(
        tiny_model().spec,
        label_map={"Healthy": "Normal", "Lung_Opacity": "Lung_Opacity"},
        operating_points={"sensitivity=0.95": OperatingPoint(0.21, chosen_by="x on validation")},
        training={
            "settings": {"epochs": 8, "batch_size": 32, "seed": 0},
            "best_epoch": 6,
            "weights": {"source": "ImageNet, from a package", "licence": "Apache-2.0"},
            "versions": {"torch": "2.15"},
            "data": {
                "fingerprint": "abc",
                "unknown_patients": 12,
                "images": {
                    "train": {"Normal": 2200, "Lung_Opacity": 2038},
                    "test": {"Normal": 0, "Lung_Opacity": 0},
                },
            },
        },
    )
    card = model_card(
        spec,
        "0123456789abcdef",
        METRICS,
        split="test",
        unreadable=3,
        unknown_patients=7,
        intervals="by counting",
    )
    lines = card.splitlines()
    assert lines[0] == "# Model card: classical-cnn 0123456789abcdef"
    assert "Research use only. Not a medical device." in card
    assert "| accuracy | all | 0.9123 | 0.9000 to 0.9200 | 798 |" in lines
    assert "| recall | Normal | not defined |  | 0 |" in lines
    assert "| sensitivity=0.95 | sensitivity | 0.9510 | 0.9200 to 0.9700 | 331 |" in lines
    assert "| view_position=PA | 0.9412 | 0.9200 to 0.9600 | 440 |" in lines
    assert "| train | 2,200 | 2,038 |" in lines
    assert not any(line.startswith("| test |") for line in lines)
    assert "Healthy as Normal" in card
    assert "licence: Apache-2.0" in card
    assert "epoch 6" in card
    assert "3 labelled films could not be read" in card
    assert "95 % intervals [29]: by counting. 7 films name no patient; each counts as one." in lines
    assert "read by no training. 12 films name no patient; each counts as one." in card
    assert "positive from 0.2100; x on validation" in card
    assert "40 to 42" in card


def test_a_model_of_which_little_is_known_has_a_card_too():
    card = model_card(
        tiny_model(synthetic=True).spec,
        "0" * 16,
        [],
        split="all",
        unreadable=0,
        unknown_patients=0,
        intervals="none",
    )
    assert "name no patient" not in card
    assert "Trained on synthetic films" in card
    assert "nothing to form subgroups" in card
