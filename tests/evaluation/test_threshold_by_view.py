"""Thresholds of single views: from labelled results, or validation films, to the decisions of runs,
reports and pictures."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import lungopacity
from lungopacity.cli import main
from lungopacity.errors import UserError
from lungopacity.evaluation.operating_points import pick
from lungopacity.evaluation.table import metric_value
from lungopacity.models import load_model, save_model, validation_films, with_operating_point
from lungopacity.models.folder import validation_parquet
from lungopacity.storage import open_store
from tests.films import dicom, grey_film
from tests.models.tiny import tiny_model, write_tiny_model


@pytest.fixture(scope="module")
def two_views(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory):
    """65 films in PA view, 65 in AP view, and ten that are PA by their labels alone; screened, and
    about half of each positive."""
    folder = tmp_path_factory.mktemp("two-views")
    store = open_store(str(folder / "archive"))
    rows = []
    for number in range(140):
        view = "" if number >= 130 else ("PA", "AP")[number % 2]
        film = grey_film(number).astype(np.uint16)
        store.write(f"{number:03}.dcm", dicom(film, BitsStored=8, HighBit=7, ViewPosition=view))
        label = ("Normal", "Lung_Opacity")[number // 2 % 2]
        rows.append((f"{number:03}.dcm", label, view or "PA", f"patient {number // 2}"))
    labels = pd.DataFrame(rows, columns=["image", "label", "view_position", "patient_id"])
    labels.to_csv(folder / "labels.csv", index=False)
    write_tiny_model(str(folder / "model"), is_compiled=True)
    run = lungopacity.screen(
        str(folder / "archive"), str(folder / "model"), str(folder / "results"), reject_quality=()
    )
    assert run.ok == 140
    return folder


def test_each_view_is_decided_by_a_threshold_of_its_own(two_views, capfd, caplog):
    model, results, labels = (str(two_views / name) for name in ("model", "results", "labels.csv"))
    code = main(
        ["threshold", "--model", model, "--results", results, "--rule", "sensitivity=0.9",
         "--name", "views", "--labels", labels, "--by-view"]
    )  # fmt: skip
    out, err = capfd.readouterr()
    assert code == 0
    assert "decided by the threshold for all films: of 10 films no view is known" in err
    point = with_operating_point(model, load_model(model), "views").spec.operating_point
    assert list(point.by_view) == ["AP", "PA"]
    frame = lungopacity.query(
        results, "SELECT image, view_position AS view, p_Lung_Opacity AS p FROM latest"
    ).to_pandas()
    frame = frame.merge(pd.read_csv(labels), on="image")
    for view, of in point.by_view.items():
        rows = frame[frame["view"] == view]
        alone = pick("sensitivity=0.9", rows["p"].to_numpy(np.float64), _is_positive(rows))
        assert (of.threshold, of.images, of.sensitivity) == (alone.threshold, 65, alone.sensitivity)
        assert of.chosen_by == f"sensitivity=0.9 on 65 {view} views among 140 films of {results}"
        assert f"{view} views: positive from {of.threshold:.4f}" in out
        assert f"{view} views: sensitivity {of.sensitivity:.4f}, specificity" in out
    thresholds = [point.threshold, *(of.threshold for of in point.by_view.values())]
    assert len(set(thresholds)) == 3

    # The run, the report and the pictures decide alike, whatever view the labels state.
    expected_N = np.array(
        [point.decide(p, view) for p, view in zip(frame["p"], frame["view"], strict=True)]
    )
    expected = dict(zip(frame["image"], expected_N, strict=True))
    assert set(expected_N) == {"positive", "negative"}
    run = lungopacity.screen(
        str(two_views / "archive"), model, str(two_views / "again"), reject_quality=(),
        operating_point="views", labels=labels,
    )  # fmt: skip
    decided = lungopacity.query(str(two_views / "again"), "SELECT image, decision FROM predictions")
    assert dict(zip(*decided.to_pydict().values(), strict=True)) == expected
    found = (expected_N == "positive") & _is_positive(frame)
    sensitivity = found.sum() / _is_positive(frame).sum()
    assert metric_value(run.metrics, "decision_sensitivity", "chosen") == sensitivity
    report = lungopacity.evaluate(
        model, [str(two_views / "archive")], labels, str(two_views / "report"), split="all",
        operating_point="views", reject_quality=(),
    )  # fmt: skip
    assert report.value("decision_sensitivity", "views") == sensitivity
    written = pq.read_table(two_views / "report" / "predictions.parquet").to_pandas()
    assert dict(zip(written["image"], written["decision"], strict=True)) == expected
    card = (two_views / "report" / "model_card.md").read_text()
    assert f"PA views: positive from {point.by_view['PA'].threshold:.4f}" in card
    lungopacity.explain(
        model, [str(two_views / "archive")], str(two_views / "pictures"),
        operating_point="views", reject_quality=(), limit=12,
    )  # fmt: skip
    shown = pq.read_table(two_views / "pictures" / "explain.parquet").to_pandas()
    assert len(shown) == 12
    assert all(shown["decision"] == shown["image"].map(expected))


def test_a_view_of_few_films_is_decided_by_the_threshold_for_all(two_views, tmp_path, caplog):
    model, results = str(two_views / "model"), str(two_views / "results")
    labels = pd.read_csv(two_views / "labels.csv")
    # Three positive films in AP view.
    labels.drop(index=[3, 7, 11]).to_csv(tmp_path / "few.csv", index=False)
    point = lungopacity.threshold(
        model, results, "youden", "few", labels=str(tmp_path / "few.csv"), by_view=True
    )
    assert list(point.by_view) == ["PA"]
    assert "AP has 29 with Lung_Opacity and 33 without; of 10 films no view is known" in caplog.text
    labels.iloc[:80].to_csv(tmp_path / "none.csv", index=False)
    with pytest.raises(UserError, match="no view has 30 films with Lung_Opacity and 30 without: "):
        lungopacity.threshold(
            model, results, "youden", "none", labels=str(tmp_path / "none.csv"), by_view=True
        )


def test_films_of_few_patients_are_told_for_all_and_for_each_view(two_views, tmp_path, caplog):
    labels = pd.read_csv(two_views / "labels.csv")
    # The opacities in PA view are of two patients, and those in AP view of twenty.
    labels["patient_id"] = [
        f"p{number}" if label == "Normal" else f"q{number % 2}-{number % (4, 80)[number % 2]}"
        for number, label in enumerate(labels["label"])
    ]
    labels.loc[labels["patient_id"] == "q0-2", "patient_id"] = ["q0-2", "q0-0"] * 17 + ["q0-2"]
    labels.to_csv(tmp_path / "labels.csv", index=False)
    lungopacity.threshold(
        str(two_views / "model"), str(two_views / "results"), "youden", "told",
        labels=str(tmp_path / "labels.csv"), by_view=True,
    )  # fmt: skip
    assert [line.partition(":")[0] for line in caplog.messages if "mostly chance" in line] == [
        "the films are of 22 patients with Lung_Opacity and 70 without",
        "the AP views are of 20 patients with Lung_Opacity and 33 without",
        "the PA views are of 2 patients with Lung_Opacity and 33 without",
    ]


def test_views_of_validation_films_have_thresholds_before_a_site_has_labels(tmp_path):
    rng, model, uri = np.random.default_rng(0), tiny_model(), str(tmp_path / "model")
    labels = ["Normal", "Lung_Opacity"] * 80
    views = ["PA" if number < 80 else "AP" for number in range(150)] + [None] * 10
    logits_VK = rng.normal(0, 1, (160, 2)).astype(np.float32)
    digests = [f"{number:064}" for number in range(160)]
    kept = validation_parquet(digests, labels, logits_VK, model.spec.class_names, views)
    save_model(uri, model, validation_parquet=kept)
    films, logits = validation_films(uri)
    assert films["view_position"].to_list() == views
    np.testing.assert_array_equal(logits, logits_VK)
    point = lungopacity.threshold(uri, None, "sensitivity=0.9", "views", by_view=True)
    p_V = model.spec.probabilities(logits_VK)[:, 1].astype(np.float64)
    for view, part in (("PA", slice(0, 80)), ("AP", slice(80, 150))):
        alone = pick("sensitivity=0.9", p_V[part], np.array(labels[part]) == "Lung_Opacity")
        assert point.by_view[view].threshold == alone.threshold
    # As earlier versions wrote it.
    table = pq.read_table(tmp_path / "model" / "validation.parquet").drop_columns("view_position")
    old = str(tmp_path / "old")
    pq.write_table(table, tmp_path / "old.parquet")
    save_model(old, model, validation_parquet=(tmp_path / "old.parquet").read_bytes())
    np.testing.assert_array_equal(validation_films(old)[1], logits_VK)
    with pytest.raises(UserError, match="of 160 films no view is known; give --results of "):
        lungopacity.threshold(old, None, "sensitivity=0.9", "views", by_view=True)


def _is_positive(frame: pd.DataFrame) -> np.ndarray:
    return (frame["label"] == "Lung_Opacity").to_numpy()
