"""Operating points in a model folder; how they are picked is tested with `threshold`."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest

from lungopacity.errors import UserError
from lungopacity.models import (
    OperatingPoint,
    points_of_sites,
    save_operating_point,
    with_operating_point,
)
from lungopacity.storage import ConflictError, LocalStore
from tests.models.tiny import tiny_model, write_tiny_model


def test_a_name_that_no_point_can_have_is_unknown(tmp_path):
    model = write_tiny_model(str(tmp_path / "m"), operating_points={"youden": OperatingPoint(0.4)})
    save_operating_point(str(tmp_path / "m"), model, "ours", OperatingPoint(0.3))
    for name in ("../../labels", "", "sensitivity=0.9"):
        with pytest.raises(UserError, match=f"no operating point '{name}'; it has youden, ours$"):
            with_operating_point(str(tmp_path / "m"), model, name)


def test_a_lost_response_is_not_mistaken_for_a_taken_name(tmp_path, monkeypatch):
    uri = str(tmp_path / "m")
    model, write = write_tiny_model(uri), LocalStore.write

    def unheard(store: LocalStore, key: str, data: bytes, **condition: object) -> None:
        write(store, key, data, **condition)
        raise ConflictError(key)

    monkeypatch.setattr(LocalStore, "write", unheard)
    save_operating_point(uri, model, "ours", OperatingPoint(0.3))
    with pytest.raises(UserError, match="has an operating point 'ours' already"):
        save_operating_point(uri, model, "ours", OperatingPoint(0.4))
    assert with_operating_point(uri, model, "ours").spec.operating_point.threshold == 0.3


def test_a_name_that_the_model_has_itself_is_refused(tmp_path):
    uri = str(tmp_path / "m")
    model = write_tiny_model(uri, operating_points={"youden": OperatingPoint(0.4)})
    with pytest.raises(UserError, match="--name youden: is one of the model's own"):
        save_operating_point(uri, model, "youden", OperatingPoint(0.3))
    assert with_operating_point(uri, model, "youden").spec.operating_point.threshold == 0.4
    # As an older version let a site do.
    nameless = replace(model, spec=replace(model.spec, operating_points={}))
    save_operating_point(uri, nameless, "youden", OperatingPoint(0.3))
    with pytest.raises(UserError, match=r"/youden\.json: .* rename the file"):
        with_operating_point(uri, model, "youden")
    points = tmp_path / "m" / "operating_points"
    (points / "youden.json").rename(points / "ours.json")
    assert with_operating_point(uri, model, "ours").spec.operating_point.threshold == 0.3


def test_a_point_by_view_is_kept_with_its_views(tmp_path):
    uri = str(tmp_path / "m")
    model = write_tiny_model(uri)
    pa = OperatingPoint(0.1, review_from=0.05, chosen_by="youden", images=80)
    ours = OperatingPoint(0.5, by_view={"PA": pa, "AP": OperatingPoint(0.9)})
    save_operating_point(uri, model, "ours", ours)
    point = with_operating_point(uri, model, "ours").spec.operating_point
    assert point == ours
    decided = [point.decide(0.3, view) for view in ("PA", "AP", "PA or AP", None)]
    assert decided == ["positive", "negative", "negative", "negative"]
    assert [point.decide(0.07, view) for view in ("PA", None)] == ["review", "negative"]
    # Earlier versions must not decide by one threshold: without it, they refuse the point.
    kept = json.loads((tmp_path / "m" / "operating_points" / "ours.json").read_text())
    assert "threshold" not in kept
    # Earlier versions refuse folders and points with fields that they do not know.
    save_operating_point(uri, model, "plain", OperatingPoint(0.5))
    for name in ("model.json", "operating_points/plain.json"):
        assert "by_view" not in (tmp_path / "m" / name).read_text()
    kept = tmp_path / "m" / "operating_points" / "ours.json"
    kept.write_text(kept.read_text().replace('"by_view": {', '"by_view": [], "other": {'))
    with pytest.raises(UserError, match="operating point 'ours' is damaged; pick it again"):
        with_operating_point(uri, model, "ours")


def test_a_model_of_one_point_says_so(tmp_path):
    model = write_tiny_model(str(tmp_path / "m"))
    with pytest.raises(UserError, match="it has only one: leave out --operating-point"):
        with_operating_point(str(tmp_path / "m"), model, "youden")


def test_a_point_that_cannot_be_read_is_not_reported_as_absent(tmp_path):
    model = write_tiny_model(str(tmp_path / "m"))
    (tmp_path / "m" / "operating_points").mkdir()
    os.mkfifo(tmp_path / "m" / "operating_points" / "ours.json")
    with pytest.raises(UserError, match=r"'ours' cannot be read \(not a regular file\)"):
        with_operating_point(str(tmp_path / "m"), model, "ours")


def test_only_points_that_can_be_chosen_are_found(tmp_path, caplog):
    uri = str(tmp_path / "m")
    model = write_tiny_model(uri, operating_points={"youden": OperatingPoint(0.4)})
    assert points_of_sites(uri, model) == {}
    ours = OperatingPoint(0.3, review_from=0.1)
    save_operating_point(uri, model, "ours", ours)
    shutil.copy(f"{uri}/operating_points/ours.json", f"{uri}/operating_points/youden.json")
    save_operating_point(uri, tiny_model(seed=5), "of-another", ours)
    for name, text in (("damaged", "{"), ("a-list", "[]"), ("too-little", "{}")):
        (tmp_path / "m" / "operating_points" / f"{name}.json").write_text(text)
    assert points_of_sites(uri, model) == {"ours": ours}
    assert "left out: " in caplog.text
    assert "'of-another' was chosen for model" in caplog.text
    for name in ("damaged", "a-list", "too-little"):
        assert f"'{name}' is damaged" in caplog.text


def test_a_point_of_another_class_is_refused(tmp_path):
    model = write_tiny_model(str(tmp_path / "m"))
    other = write_tiny_model(str(tmp_path / "n"), positive_class="Normal")
    assert other.model_id == model.model_id
    save_operating_point(str(tmp_path / "m"), model, "ours", OperatingPoint(0.3))
    shutil.copytree(tmp_path / "m" / "operating_points", tmp_path / "n" / "operating_points")
    with pytest.raises(UserError, match=r"probability of Lung_Opacity, .* decides about Normal"):
        with_operating_point(str(tmp_path / "n"), other, "ours")
    kept = tmp_path / "n" / "operating_points" / "ours.json"
    document = json.loads(kept.read_text())
    assert document.pop("positive_class") == "Lung_Opacity"
    kept.write_text(json.dumps(document))  # as older versions wrote it
    assert with_operating_point(str(tmp_path / "n"), other, "ours").spec.operating_point == (
        OperatingPoint(0.3)
    )
