import math
from dataclasses import replace
from datetime import UTC, datetime

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from lungopacity.evaluation.bootstrap import Resampling
from lungopacity.evaluation.measure import ScoredImages, measure
from lungopacity.evaluation.table import metric_value, metrics_table
from lungopacity.results.schema import METRICS_SCHEMA, predictions_schema
from lungopacity.screening import aggregate
from lungopacity.screening.aggregate import label_metrics, run_metrics
from tests.models.tiny import tiny_model

SPEC = tiny_model().spec
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def predictions(*rows: dict) -> duckdb.DuckDBPyRelation:
    common = {
        "run_id": "r", "model_id": "m", "screened_at": NOW, "archive": "a",
        "source_etag": "e", "source_size_bytes": 1, "source_modified_at": NOW, "status": "ok",
    }  # fmt: skip
    filled = []
    for number, row in enumerate(rows):
        scores = {}
        if "p" in row:
            p = row.pop("p")
            scores = {"p_Normal": 1 - p, "p_Lung_Opacity": p,
                      "decision": "positive" if p >= 0.5 else "negative"}  # fmt: skip
        filled.append({**common, "image": f"{number}.png", **scores, **row})
    return duckdb.from_arrow(
        pa.Table.from_pylist(filled, schema=predictions_schema(SPEC.class_names))
    )


MIXED = (
    {"p": 0.9, "quality_low_contrast": True, "quality_out_of_distribution": False},
    {"p": 0.51, "quality_low_contrast": True, "quality_out_of_distribution": True},
    {"p": 0.02},
    {"p": 1.0},
    {"status": "failed", "error_code": "truncated"},
    {"status": "failed", "error_code": "truncated"},
    {"status": "rejected", "error_code": "not_an_image"},
)


def test_counts_rates_codes_and_speed():
    metrics = run_metrics(predictions(*(dict(row) for row in MIXED)), SPEC, seconds=3.5)
    assert metric_value(metrics, "images") == 7
    assert metric_value(metrics, "images_ok") == 4
    assert metric_value(metrics, "images_failed") == 2
    assert metric_value(metrics, "images_rejected") == 1
    assert metric_value(metrics, "error_code", "truncated") == 2
    assert metric_value(metrics, "error_code", "not_an_image") == 1
    assert len([m for m in metrics if m.metric == "error_code"]) == 2
    assert metric_value(metrics, "decision_rate", "positive") == 0.75
    assert metric_value(metrics, "quality_flag", "low_contrast") == 2
    assert metric_value(metrics, "quality_flag", "out_of_distribution") == 1
    assert metric_value(metrics, "quality_flag", "blank") == 0
    assert {m.n for m in metrics if m.metric in ("images_ok", "error_code", "quality_flag")} == {7}
    assert metric_value(metrics, "decision_rate", "review") == 0
    assert metric_value(metrics, "seconds") == 3.5
    assert metric_value(metrics, "images_per_s") == 2.0
    # A part of the images took none of these seconds.
    resumed = run_metrics(
        predictions(*(dict(row) for row in MIXED)), SPEC, seconds=3.5, resumed=True
    )
    assert metric_value(resumed, "images_per_s") is None
    (rate,) = [m for m in metrics if (m.metric, m.class_name) == ("decision_rate", "positive")]
    assert rate.ci_low < 0.75 < rate.ci_high
    assert rate.n == 4


def test_the_histogram_holds_every_scored_image_once():
    metrics = run_metrics(predictions(*(dict(row) for row in MIXED)), SPEC, seconds=1)
    bins = {m.class_name: m.value for m in metrics if m.metric == "score_histogram"}
    assert len(bins) == 20
    assert sum(bins.values()) == 4
    assert (bins["0.00-0.05"], bins["0.50-0.55"], bins["0.95-1.00"]) == (1, 1, 1)


def test_a_run_of_no_image_has_metrics_all_the_same():
    metrics = run_metrics(predictions(), SPEC, seconds=1)
    assert metric_value(metrics, "images") == 0
    assert metric_value(metrics, "decision_rate", "positive") is None  # no rate of nothing
    assert all(math.isfinite(metric.value) for metric in metrics)
    assert metrics_table(metrics, "r", "m", synthetic=False).schema == METRICS_SCHEMA


def labels(*names: str, **columns: list) -> pd.DataFrame:
    facts = {
        "patient_id": None,
        "view_position": None,
        "patient_sex": None,
        "patient_age_years": None,
    }
    return pd.DataFrame({"image": names, **facts, **columns})


def test_metrics_against_labels_count_what_can_be_judged():
    table = predictions(
        {"p": 0.9, "label": "Lung_Opacity"},
        {"p": 0.9, "label": "Normal"},
        {"p": 0.1, "label": "Normal"},
        {"p": 0.1, "label": "Not_Normal"},
        {"p": 0.1},
        {"status": "failed", "error_code": "truncated", "label": "Normal"},
    )
    metrics = label_metrics(table, SPEC, labels(*(f"{n}.png" for n in range(6))))
    assert metric_value(metrics, "accuracy") == pytest.approx(2 / 3)
    (accuracy,) = [m for m in metrics if (m.metric, m.group) == ("accuracy", "all")]
    assert accuracy.n == 3
    # A film that was spared the model is in no metric, and is counted.
    (unscored,) = [m for m in metrics if m.metric == "films_without_score"]
    assert (unscored.value, unscored.n) == (1, 4)


def test_images_of_a_file_with_several_are_counted_and_in_no_metric():
    """The label of the file may mean any of them."""
    row = {"p": 0.9, "label": "Lung_Opacity"}
    table = predictions(
        row | {"image": "two.dcm", "frame": 0, "p": 0.1},
        row | {"image": "two.dcm", "frame": 1, "status": "failed"},
        *(
            row | {"image": "x.tar", "member": "a.tif", "member_index": 4, "frame": n}
            for n in (0, 1)
        ),
        # A page alone, and a neighbour in the shard.
        row | {"image": "one.tif", "frame": 0},
        row | {"image": "x.tar", "member": "b.tif", "member_index": 5},
    )
    metrics = label_metrics(table, SPEC, labels("two.dcm", "a.tif", "one.tif", "b.tif"))
    (of_several,) = [m for m in metrics if m.metric == "films_of_several_images"]
    assert (of_several.value, of_several.n) == (4, 6)
    assert metric_value(metrics, "films_without_score") == 0
    (accuracy,) = [m for m in metrics if (m.metric, m.group) == ("accuracy", "all")]
    assert (accuracy.value, accuracy.n) == (1, 2)
    frames = [row | {"image": "two.dcm", "frame": n} for n in (0, 1)]
    assert (
        metric_value(label_metrics(predictions(*frames), SPEC, labels("two.dcm")), "accuracy")
        is None
    )


def test_labels_of_members_are_those_of_their_own_names_and_of_the_class_that_decides():
    spec = replace(SPEC, positive_class="Normal", label_map={"Healthy": "Normal"})
    table = predictions(
        {"p": 0.9, "label": "Lung_Opacity", "image": "x.tar", "member": "a.png"},
        {"p": 0.9, "label": "Healthy", "image": "x.tar", "member": "b.png"},
    )
    # In another order, and with one that has no image.
    told = labels("c.png", "b.png", "a.png", patient_sex=["M", "M", "F"])
    metrics = label_metrics(table, spec, told)
    assert {m.group: (m.value, m.n) for m in metrics if m.metric == "accuracy"} == {
        "all": (0.5, 2), "patient_sex=F": (1, 1), "patient_sex=M": (0, 1),
        "view_position=unknown": (0.5, 2), "age=unknown": (0.5, 2),
    }  # fmt: skip
    assert metric_value(metrics, "films_known_to_model") == 0
    assert {m.class_name for m in metrics if m.metric == "brier_binary"} == {"Normal"}


def test_films_that_the_model_learnt_from_do_not_count():
    table = predictions(
        {"p": 0.9, "label": "Lung_Opacity", "content_sha256": "learnt"},
        {"p": 0.9, "label": "Normal", "content_sha256": "new"},
    )
    metrics = label_metrics(table, SPEC, labels("0.png", "1.png"), {"learnt", "another"})
    assert metric_value(metrics, "films_known_to_model") == 1
    told = [m for m in metrics if m.metric == "accuracy" and m.group == "all"]
    assert [(m.value, m.n) for m in told] == [(0.0, 1)]
    *_, left_out = label_metrics(table, SPEC, labels("0.png", "1.png"), {"learnt", "new"})
    assert (left_out.metric, left_out.value) == ("films_known_to_model", 2)


def test_films_that_the_point_was_picked_on_count_and_are_told():
    table = predictions(
        {"p": 0.9, "label": "Lung_Opacity", "content_sha256": "learnt"},
        {"p": 0.9, "label": "Lung_Opacity", "content_sha256": "picked on"},
        {"p": 0.9, "label": "Normal", "content_sha256": "new"},
    )
    told = labels("0.png", "1.png", "2.png")
    metrics = label_metrics(table, SPEC, told, {"learnt"}, {"picked on", "learnt", "another"})
    (among,) = [m for m in metrics if m.metric == "films_operating_point_picked_on"]
    assert (among.value, among.n) == (1, 2)
    assert metric_value(metrics, "accuracy") == 0.5


def test_what_the_labels_say_of_a_film_goes_before_its_header():
    """As in `evaluate`: the same films are in the same subgroups."""
    table = predictions(
        {"p": 0.9, "label": "Lung_Opacity", "view_position": "AP", "patient_age_years": 50},
        {"p": 0.1, "label": "Normal", "patient_sex": "F"},
        {"p": 0.1, "label": "Normal", "view_position": "LL", "patient_sex": "F"},
    )
    told = labels(
        *(f"{n}.png" for n in range(3)),
        view_position=[None, "PA", "PA"],
        patient_sex=["M", None, None],
        patient_age_years=[None, 93.0, None],
    )
    metrics = label_metrics(table, SPEC, told)
    groups = {m.group: m.n for m in metrics if m.metric == "accuracy"}
    assert groups == {
        "all": 3,
        "view_position=AP": 1, "view_position=PA": 2,
        "patient_sex=F": 2, "patient_sex=M": 1,
        "age=40-64": 1, "age=90+": 1, "age=unknown": 1,
    }  # fmt: skip


def test_a_run_is_measured_as_by_evaluate_with_its_patients_drawn_together():
    """Forty films of twenty patients; the same rows, measured beside a cluster."""
    p = np.round(np.random.default_rng(0).random(40), 3).astype(np.float32)
    truth = (np.arange(40) % 3 == 0).astype(int)
    patients = [f"p{number // 2}" for number in range(40)]
    table = predictions(
        *({"p": float(p[n]), "label": SPEC.class_names[truth[n]]} for n in range(40))
    )
    told = labels(
        *(f"{n}.png" for n in range(40)), patient_id=patients, patient_sex=["F", "M"] * 20
    )
    _, _, _, _, *found = label_metrics(table, SPEC, told)
    images = ScoredImages(
        truth, np.stack([1 - p, p], axis=1).astype(np.float64), SPEC.class_names, "Lung_Opacity",
        points={"chosen": SPEC.operating_point},
    )  # fmt: skip
    groups = {"view_position": [None] * 40, "patient_sex": ["F", "M"] * 20, "age": [None] * 40}
    expected = measure(images, groups, Resampling.of(patients))
    for one, other in zip(found, expected, strict=True):
        assert (one.group, one.metric, one.class_name) == (
            other.group, other.metric, other.class_name,
        )  # fmt: skip
        for name in ("value", "ci_low", "ci_high", "n", "patients"):
            told, wanted = getattr(one, name), getattr(other, name)
            assert told == (
                None if wanted is None else pytest.approx(wanted, nan_ok=True, rel=1e-6)
            )
    assert {one.ci_method for one in found} == {"bootstrap", "wilson_effective", None}


def test_of_films_without_patient_id_the_hashed_one_of_the_header_tells_the_patient(caplog):
    caplog.set_level("INFO")
    table = predictions(
        *({"p": 0.9, "label": "Normal", "patient_hmac": "a"} for _ in range(3)),
        {"p": 0.1, "label": "Lung_Opacity", "patient_hmac": "a"},
        {"p": 0.1, "label": "Lung_Opacity"},
    )
    names = [f"{n}.png" for n in range(5)]
    label_metrics(table, SPEC, labels(*names, patient_id=["p", *[None] * 4]))
    assert "over 3 patients of 5 films" in caplog.text
    assert "; films without a known patient, each counted as one: 1" in caplog.text


def test_films_of_one_published_score_are_ranked_alike():
    table = predictions(
        {"p": 1.0, "p_Normal": 1e-9, "label": "Lung_Opacity"},
        {"p": 1.0, "p_Normal": 1e-8, "label": "Normal"},
    )
    metrics = label_metrics(table, SPEC, labels("0.png", "1.png"))
    assert metric_value(metrics, "roc_auc", "Lung_Opacity") == 0.5


def test_of_very_many_labelled_films_fewer_replicates_are_drawn(monkeypatch, caplog):
    monkeypatch.setattr(aggregate, "_MOST_DRAWN", 1000)
    caplog.set_level("INFO")
    table = predictions(*({"p": 0.9, "label": "Normal"} for _ in range(4)))
    names = [f"{n}.png" for n in range(4)]
    label_metrics(table, SPEC, labels(*names))
    assert "over 4 patients of 4 films, 250 replicates" in caplog.text
    monkeypatch.setattr(aggregate, "_MOST_DRAWN", 1)
    label_metrics(table, SPEC, labels(*names))
    assert "4 films, 200 replicates" in caplog.text


def test_no_label_of_the_models_classes_means_no_metric():
    assert label_metrics(predictions({"p": 0.9, "label": "Other"}), SPEC, labels("0.png")) == []


def test_labelled_films_of_which_none_has_a_score_are_counted():
    table = predictions({"status": "rejected", "error_code": "lateral_view", "label": "Normal"})
    _, unscored = label_metrics(table, SPEC, labels("0.png"))
    assert (unscored.metric, unscored.value, unscored.n) == ("films_without_score", 1, 1)
