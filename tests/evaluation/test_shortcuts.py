"""Shortcuts in films that were made to have them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from lungopacity import progress
from lungopacity.dataset.pixels import LabelledPixels
from lungopacity.evaluation.bootstrap import Resampling
from lungopacity.evaluation.shortcuts import (
    Shortcut,
    _border_scores,
    _folds,
    _rates,
    auc_within_folds,
    shortcuts_of,
)


def found_in(positives: int, negatives: int, films: int, **told: object) -> dict[str, Shortcut]:
    """Of so many patients of a kind, with so many films each, of which the view tells the label."""
    positive_N = np.repeat([True] * positives + [False] * negatives, films)
    count = len(positive_N)
    frame = pd.DataFrame(
        {
            "image": [f"{n}.png" for n in range(count)],
            "patient_id": np.repeat(np.arange(positives + negatives), films).astype(str),
            "view_position": np.where(positive_N, "AP", "PA"),
            "source": "x.tar",
            "format": "png",
            **dict.fromkeys(("patient_sex", "patient_age_years", "photometric_interpretation")),
            "rows": 64,
            "columns": 64,
        }
    )
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16), dtype=np.uint8)
    data = LabelledPixels(
        pixels,
        positive_N.astype(int),
        np.full(count, "test"),
        ("a", "b"),
        frame,
        frame[:0],
        frame[:0],
        False,
    )
    resampling = Resampling.of(frame["patient_id"].tolist())
    found = shortcuts_of(data, "b", pd.DataFrame(told, index=frame["image"]), resampling)
    return {item.fact: item for item in found}


@pytest.mark.parametrize(
    ("positives", "negatives", "films"), [(1, 1, 1), (1, 2, 1), (2, 2, 1), (4, 4, 1), (2, 3, 6)]
)
def test_few_films_are_tried_as_far_as_they_go(positives, negatives, films):
    found = found_in(positives, negatives, films)
    assert set(found) == (
        {"view_position", "border of the film alone"} if min(positives, negatives) > 1 else set()
    )
    if found:
        assert found["view_position"].auc == 1.0


def test_the_auc_of_a_useless_fact_is_that_of_chance():
    rng = np.random.default_rng(0)
    told = {f"fact {number}": rng.choice(["a", "b"], 30) for number in range(100)}
    found = found_in(10, 20, 1, **told)
    assert np.mean([found[name].auc for name in told]) == pytest.approx(0.5, abs=0.04)


def test_pairs_of_films_are_counted_within_folds_alone():
    rng = np.random.default_rng(0)
    positive_N, scores_N = rng.random(40) < 0.4, rng.integers(0, 5, 40) / 4
    fold_N, weights_RN = rng.integers(0, 3, 40), rng.integers(0, 3, (4, 40)).astype(float)
    higher_NN = (scores_N[:, None] > scores_N) + 0.5 * (scores_N[:, None] == scores_N)
    counted_NN = positive_N[:, None] & ~positive_N & (fold_N[:, None] == fold_N)
    expected = [
        np.average(higher_NN, weights=counted_NN * weights_N[:, None] * weights_N)
        for weights_N in weights_RN
    ]
    found_R = auc_within_folds(positive_N, scores_N, fold_N, weights_RN)
    assert found_R == pytest.approx(expected)
    apart_N = positive_N.astype(int)
    assert np.isnan(auc_within_folds(positive_N, scores_N, apart_N, weights_RN)).all()


def test_what_the_labels_tell_is_tried_beside_what_the_files_do():
    kinds = ["dcm"] * 20 + ["jpeg"] * 20
    found = found_in(10, 10, 2, format=kinds, scanner=[None, *kinds[1:]])
    assert found["format of the labels"].auc == 1.0
    assert "format" not in found  # all alike
    assert (found["scanner"].values, found["scanner"].n) == (3, 39)


def test_values_that_other_patients_lack_tell_nothing_by_themselves():
    """Half of the positives have serial numbers of their own; the others one that all negatives
    have, too. What is unknown is then likelier positive than that one."""
    serials = [f"serial {number}" for number in range(10)] + ["common"] * 30
    assert found_in(20, 20, 1, serial=serials)["serial"].auc == pytest.approx(0.75, abs=0.05)


def test_a_film_is_ranked_by_the_films_of_all_other_folds_and_by_no_film_of_its_own():
    rng = np.random.default_rng(0)
    values = [*rng.choice(["a", "b", None], 58), "only once", "only once"]
    positive_N, fold_N = rng.random(60) < 0.3, np.append(rng.integers(0, 4, 58), [0, 0])
    expected = []
    for value, fold in zip(values, fold_N, strict=True):
        others = [n for n in range(60) if fold_N[n] != fold]
        alike = [n for n in others if values[n] == value]
        expected.append(np.mean([positive_N[n] for n in alike or others]))
    scores_N, count = _rates(values, positive_N, fold_N)
    assert scores_N == pytest.approx(expected)
    assert count == 4


def test_a_fact_that_is_known_of_the_films_of_one_class_alone_is_a_shortcut():
    found = found_in(10, 10, 2, site=["North"] * 20 + [None] * 20)
    assert (found["site"].auc, found["site"].values, found["site"].n) == (1.0, 2, 20)


def test_more_films_of_the_same_patients_are_no_more_evidence():
    scanners = np.array(["GE"] * 7 + ["Fuji"] * 10 + ["GE"] * 3)
    widths = []
    for films in (1, 4):
        found = found_in(10, 10, films, scanner=np.repeat(scanners, films))["scanner"]
        assert found.ci_method == "bootstrap"
        widths.append(found.ci_high - found.ci_low)
    assert widths[1] > 0.8 * widths[0]


def test_slow_reading_of_borders_logs_the_class(monkeypatch, caplog):
    for least in (60.0, 0.0):
        monkeypatch.setattr(progress, "_QUICK_S", least)
        with caplog.at_level("INFO"):
            found_in(4, 4, 1)
    assert [line.split(" folds")[0] for line in caplog.messages] == [
        "Reading borders for b: 4 of 4"
    ]


@pytest.mark.parametrize(("rows", "seen"), [(slice(2, 14), False), (slice(0, 2), True)])
def test_the_border_alone_is_seen_of_a_film(rows, seen):
    """A bright patch that tells the class, on a film of 16 pixels whose border has 2."""
    positive_N = np.arange(80) % 2 == 1
    pixels_NHW = np.random.default_rng(1).integers(0, 100, (80, 16, 16), dtype=np.uint8)
    pixels_NHW[positive_N, rows, 2:14] = 255
    fold_N = _folds(positive_N, np.arange(80).astype(str))
    auc = roc_auc_score(positive_N, _border_scores(pixels_NHW, positive_N, fold_N, "Borders"))
    assert auc > 0.95 if seen else 0.25 < auc < 0.75
