"""The rows that the model stage makes of films, without Ray."""

from __future__ import annotations

import resource
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
import torch
from ray.exceptions import RaySystemError

from lungopacity.errors import UserError
from lungopacity.models import OperatingPoint
from lungopacity.models.scorer import Scorer, Scores
from lungopacity.results.schema import READ_SCHEMA, score_fields
from lungopacity.runtime import code_digest
from lungopacity.screening.explanations import Explainer
from lungopacity.screening.resources import ScoringResources
from lungopacity.screening.scoring import ScoreImages, _pixels
from tests.models.tiny import tiny_model, with_distribution

FILMS = np.random.default_rng(0).integers(0, 256, (40, 32, 32), dtype=np.uint8)

ON_CPU = ScoringResources(1, 1, 1.0, 0.0, 1, False)
ON_GPU = ScoringResources(1, 1, 0.0, 1.0, None, True)


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "get", lambda model: model)


def read_rows(films_NHW: np.ndarray) -> pa.Table:
    """As they come from reading, after a row of a file that could not be read."""
    row = {
        "image": "?", "source_etag": "e", "source_size_bytes": 9, "synthetic": False,
        "source_modified_at": datetime(2026, 1, 1, tzinfo=UTC), "shown_height": 32,
        "shown_width": 32, "content_sha256": "0" * 64,
    }  # fmt: skip
    rows = [row | {"status": "failed", "error_code": "empty", "error_stage": "fetch"}]
    rows += [row | {"status": "ok", "pixels": film.tobytes()} for film in films_NHW]
    return pa.Table.from_pylist(rows, schema=READ_SCHEMA)


def test_films_have_their_own_scores_however_their_rows_lie_in_memory():
    stage = ScoreImages(with_distribution(tiny_model(), FILMS), ON_CPU, False, None, "float32")
    whole = read_rows(FILMS)
    expected = stage(whole).drop_columns("screened_at")
    parts = [whole.slice(0, 1), whole.slice(1, 5), whole.slice(6, 0), whole.slice(6)]
    assert stage(pa.concat_tables(parts)).drop_columns("screened_at").equals(expected)
    assert stage(whole.slice(7)).drop_columns("screened_at").equals(expected.slice(7))
    # In one piece they are seen where they lie, and in several put together once.
    assert not _pixels(whole["pixels"].slice(1)).flags.owndata
    np.testing.assert_array_equal(_pixels(pa.concat_tables(parts)["pixels"]), FILMS.ravel())
    assert not len(_pixels(whole["pixels"].slice(0, 1)))


@pytest.mark.usefixtures("core_dumps")
def test_a_crash_of_an_actor_leaves_no_image_of_films_in_memory():
    ScoreImages(tiny_model(), ON_CPU, False, None, "float32", code_digest())
    assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0


@pytest.mark.parametrize(("broken", "reject_unlike"), [("logits_NK", False), ("features_NF", True)])
def test_a_score_that_is_not_a_number_is_a_failure_without_decision(
    monkeypatch, broken, reject_unlike
):
    model = with_distribution(tiny_model(), FILMS)
    stage = ScoreImages(model, ON_CPU, reject_unlike, Explainer("r"), "float32")
    exact = stage.scorer.scores

    def faulty(pixels_NHW: np.ndarray, batch_size: int) -> Scores:
        scores = exact(pixels_NHW, batch_size)
        getattr(scores, broken)[1, 0] = np.nan
        return scores

    sound = stage(read_rows(FILMS[:3])).to_pylist()
    monkeypatch.setattr(stage.scorer, "scores", faulty)
    rows = stage(read_rows(FILMS[:3])).to_pylist()
    told = [tuple(row[f"error_{key}"] for key in ("code", "stage")) for row in rows]
    assert told == [("empty", "fetch"), (None, None), ("internal", "score"), (None, None)]
    assert [row["status"] for row in rows] == ["failed", "ok", "failed", "ok"]
    assert "not a number" in rows[2]["error_message"]
    scored = [field.name for field in score_fields(model.spec.class_names)]
    assert {rows[2][name] for name in (*scored, "explanation_png")} == {None}
    for place in (1, 3):
        assert {**rows[place], "screened_at": None} == {**sound[place], "screened_at": None}


@pytest.mark.parametrize("reject_unlike", [False, True])
def test_a_film_unlike_those_of_training_is_flagged_or_has_no_score_where_told(reject_unlike):
    # All are positive, so that only what is rejected has no map.
    model = with_distribution(tiny_model(operating_point=OperatingPoint(0.0)), FILMS)
    stage = ScoreImages(model, ON_CPU, reject_unlike, Explainer("r"), "float32")
    _, like, unlike = stage(read_rows(np.stack([FILMS[0], np.zeros_like(FILMS[0])]))).to_pylist()
    flags = [row["quality_out_of_distribution"] for row in (like, unlike)]
    assert (flags, unlike["out_of_distribution_score"] > 1) == ([False, True], True)
    assert like["status"] == "ok"
    assert (like["decision"], like["explanation_png"] is None) == ("positive", False)
    said = [unlike[name] for name in ("status", "error_code", "error_stage")]
    names = [f"{kind}_{name}" for kind in ("p", "logit") for name in model.spec.class_names]
    told = [unlike[name] is None for name in (*names, "predicted_label", "decision")]
    if reject_unlike:
        assert (said, set(told)) == (["rejected", "poor_quality", "score"], {True})
        assert unlike["explanation_png"] is None
    else:
        assert (said, set(told)) == (["ok", None, None], {False})
        assert unlike["explanation_png"] is not None


def test_only_a_distance_above_1_is_unlike_those_of_training(monkeypatch):
    stage = ScoreImages(with_distribution(tiny_model(), FILMS), ON_CPU, True, None, "float32")
    distances = np.array([1.0, 1.001], np.float32)
    monkeypatch.setattr(stage.scorer, "out_of_distribution", lambda _: distances)
    rows = stage(read_rows(FILMS[:2])).to_pylist()
    assert [row["status"] for row in rows] == ["failed", "ok", "rejected"]


def test_each_film_is_decided_by_the_threshold_of_its_own_view():
    by_view = {"AP": OperatingPoint(1.0), "PA": OperatingPoint(0.0)}
    model = tiny_model(operating_point=OperatingPoint(1.0, review_from=0.0, by_view=by_view))
    views = ["PA", "PA", "AP", None, "LL", "PA"]  # the first, of the file that could not be read
    table = read_rows(FILMS[:5])
    at = table.schema.get_field_index("view_position")
    table = table.set_column(at, table.schema.field(at), pa.array(views))
    rows = ScoreImages(model, ON_CPU, False, None, "float32")(table).to_pylist()
    decided = [row["decision"] for row in rows]
    assert decided == [None, "positive", "negative", "review", "review", "positive"]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (torch.OutOfMemoryError("no room\nlong"), (UserError, "little memory: no room; use a sm")),
        (torch.AcceleratorError("misaligned\nlong"), (RaySystemError, "System error: misaligned")),
        (ValueError("ours"), (ValueError, "ours")),
    ],
)
def test_an_error_of_a_gpu_is_explained_or_tried_again(monkeypatch, raised, expected):
    def fails(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kind, said = expected
    stage = ScoreImages(tiny_model(), ON_CPU, False, None, "float32")
    monkeypatch.setattr(stage.scorer, "scores", fails)
    with pytest.raises(type(raised)):
        stage(read_rows(FILMS[:1]))
    stage.use_gpu = True
    with pytest.raises(kind, match=said):
        stage(read_rows(FILMS[:1]))
    monkeypatch.setattr(Scorer, "network", property(fails))
    stage = ScoreImages(tiny_model(), ON_GPU, False, None, "float32")
    with pytest.raises(kind, match=said):
        stage(read_rows(FILMS[:1]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_torch_cannot_use_is_reported_by_the_first_call():
    stage = ScoreImages(tiny_model(), ON_GPU, False, None, "float32")
    with pytest.raises(UserError, match=r"torch cannot use a node's GPU: .*; run `lungopacity"):
        stage(read_rows(FILMS[:1]))
