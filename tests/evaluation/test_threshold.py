"""A site's own threshold: from labelled results to the decisions of the next run."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import lungopacity
from lungopacity.cli import main
from lungopacity.errors import UserError
from lungopacity.evaluation.metrics import Metric
from lungopacity.evaluation.threshold import PickedPoint
from lungopacity.models import (
    films_of_site_point,
    load_model,
    save_model,
)
from lungopacity.models.folder import training_films_parquet, validation_parquet
from lungopacity.storage import open_store
from tests.films import encoded, grey_film, tiff_of_pages
from tests.models.tiny import tiny_model, write_tiny_model

FILMS = 90


@pytest.fixture(scope="module")
def site(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory):
    """An archive that was screened once, and its labels: every third film is positive, and one
    more is none."""
    folder = tmp_path_factory.mktemp("site")
    store = open_store(str(folder / "archive"))
    names = [f"x/{number:02}.png" for number in range(FILMS)]
    for number, name in enumerate(names):
        store.write(name, encoded(grey_film(number)))
    store.write("x/broken.png", b"no film")
    write_tiny_model(str(folder / "model"), is_compiled=True)
    labels = pd.DataFrame(
        {
            "image": names,
            "label": [("Lung_Opacity", "Normal", "Normal")[n % 3] for n in range(FILMS)],
        }
    )
    labels.to_csv(folder / "labels.csv", index=False)
    run = lungopacity.screen(
        str(folder / "archive"), str(folder / "model"), str(folder / "results"),
        run_id="first", labels=str(folder / "labels.csv"),
    )  # fmt: skip
    assert (run.ok, run.failed) == (FILMS, 1)
    return folder


def test_a_sites_threshold_is_picked_kept_and_decides(site):
    model, results = str(site / "model"), str(site / "results")
    point = lungopacity.threshold(model, results, "sensitivity=0.8", "ours", run_id="first")
    assert point.images == FILMS
    assert point.sensitivity >= 0.8
    told = {item.metric: item for item in point.metrics}
    assert told["decision_sensitivity"].value == point.sensitivity
    assert told["decision_specificity"].value == point.specificity
    assert (point.unknown_patients, point.left_out) == (FILMS, 0)
    assert (point.of_no_class, point.unscored) == ({}, 0)
    assert "not counted" not in point.summary()
    document = json.loads((site / "model" / "operating_points" / "ours.json").read_text())
    assert document["model_id"] == load_model(model).model_id
    assert "Research use only" in document["notice"]
    assert films_of_site_point(model, "ours") == {
        hashlib.sha256(encoded(grey_film(number))).hexdigest() for number in range(FILMS)
    }

    # Another archive with the same names.
    shutil.copytree(site / "archive", site / "copy")
    again = lungopacity.screen(
        str(site / "copy"), model, results, run_id="second", operating_point="ours"
    )
    rows = lungopacity.query(
        results,
        "SELECT p_Lung_Opacity p, decision FROM predictions "
        "WHERE run_id = 'second' AND status = 'ok'",
    ).to_pandas()
    expected = np.where(rows["p"] >= point.threshold, "positive", "negative")
    assert (rows["decision"] == expected).all()
    assert 0 < again.positive == (rows["decision"] == "positive").sum()
    record = lungopacity.query(results, "SELECT record FROM runs WHERE run_id = 'second'")
    assert json.loads(record["record"][0].as_py())["settings"]["operating_point"] == "ours"
    with pytest.raises(UserError, match=r"90 names belong to several films .*, such as x/00\.png"):
        lungopacity.threshold(model, results, "youden", "mixed", labels=str(site / "labels.csv"))


def test_labels_may_come_later_and_from_a_file(site, tmp_path, capfd):
    point = lungopacity.threshold(
        str(site / "model"), str(site / "results"), "youden", "from-file",
        run_id="first", labels=str(site / "labels.csv"),
    )  # fmt: skip
    assert point.images == FILMS
    # Ten patients have nine films each: the films of one are drawn together.
    labels = pd.read_csv(site / "labels.csv")
    patients = [f"p{number // 9}" for number in range(FILMS)]
    labels = labels.assign(patient_id=patients, image=labels["image"].str.removeprefix("x/"))
    labels.to_csv(tmp_path / "patients.csv", index=False)
    code = main(
        ["threshold", "--model", str(site / "model"), "--results", str(site / "results"),
         "--rule", "youden", "--name", "clustered", "--run-id", "first",
         "--labels", str(tmp_path / "patients.csv")]
    )  # fmt: skip
    out, err = capfd.readouterr()
    assert code == 0
    share = r"0\.\d{4} \(0\.\d{4} to [01]\.\d{4}\)"
    assert re.search(f"; sensitivity {share}, specificity {share} on {FILMS} films\n", out)
    assert "95 % intervals: Wilson's over an effective sample, of 10 patients with 90 films" in out
    assert "no known patient" not in out
    assert "of 10 patients with Lung_Opacity and 10 without: with fewer than 30, a threshold" in err


def test_films_that_the_model_learnt_from_set_no_threshold(site, tmp_path, caplog):
    """Two of 60 negatives, and one of 30 positives: then these are too few."""
    results, labels = str(site / "results"), str(site / "labels.csv")
    digests = [hashlib.sha256(encoded(grey_film(number))).hexdigest() for number in range(3)]
    for name, known in (("two", digests[1:]), ("three", digests)):
        model = str(tmp_path / name)
        write_tiny_model(model, training_films=training_films_parquet(known))
        if name == "two":
            point = lungopacity.threshold(
                model, results, "youden", "ours", run_id="first", labels=labels
            )
            assert (point.images, point.left_out) == (FILMS - 2, 2)
            assert "left out: 2 of 90 labelled films, on which the model" in caplog.text
        else:
            with pytest.raises(UserError, match="but was not trained on, 29 are labelled"):
                lungopacity.threshold(
                    model, results, "youden", "ours", run_id="first", labels=labels
                )


def test_without_results_another_rule_is_applied_to_the_validation_films(tmp_path, capfd):
    """No cluster is started, and no film is read."""
    rng = np.random.default_rng(0)
    logits_VK = rng.normal(0, 1, (80, 2)).astype(np.float32)
    labels = ["Lung_Opacity" if one else "Normal" for one in rng.random(80) < 0.5]
    model = tiny_model(temperature=2.0, class_biases=(-0.5, 0.5))
    for name, films in (("model", 80), ("few", 40)):
        kept = validation_parquet(
            [f"{n:064}" for n in range(films)],
            labels[:films],
            logits_VK[:films],
            model.spec.class_names,
        )
        save_model(str(tmp_path / name), model, validation_parquet=kept)
    command = ["threshold", "--rule", "cost=3", "--name", "dear", "--model"]
    assert main([*command, str(tmp_path / "model")]) == 0
    assert "on 80 films" in capfd.readouterr().out
    kept = json.loads((tmp_path / "model" / "operating_points" / "dear.json").read_text())
    assert (kept["chosen_by"], kept["images"]) == ("cost=3 on validation", 80)
    assert films_of_site_point(str(tmp_path / "model"), "dear") == set()
    opacity_V = np.array(labels) == "Lung_Opacity"
    decided_V = model.spec.probabilities(logits_VK)[:, 1].astype(float) >= kept["threshold"]
    assert decided_V[opacity_V].mean() == pytest.approx(kept["sensitivity"])
    assert (~decided_V)[~opacity_V].mean() == pytest.approx(kept["specificity"])
    for more, said in (
        ([str(tmp_path / "model"), "--run-id", "x"], "--run-id and --labels belong to --results"),
        ([str(tmp_path / "few")], "of its validation films"),
    ):
        assert main([*command, *more]) == 2
        assert said in capfd.readouterr().err


def test_labelled_films_that_set_no_threshold_are_counted(site, tmp_path, caplog):
    labels = pd.read_csv(site / "labels.csv")
    labels.loc[[1, 2, 4], "label"] = ["Not_Normal", "Lung Opacity", "Not_Normal"]
    labels.loc[FILMS] = ["broken.png", "Normal"]
    labels.loc[FILMS + 1] = ["x/screened-by-nobody.png", "Normal"]
    labels.to_csv(tmp_path / "labels.csv", index=False)
    point = lungopacity.threshold(
        str(site / "model"), str(site / "results"), "youden", "fewer",
        run_id="first", labels=str(tmp_path / "labels.csv"),
    )  # fmt: skip
    assert point.images == FILMS - 3
    assert "left out: 3 films whose label is of none of the model's classes, and 1" in caplog.text
    told = "2 labelled Not_Normal, 1 labelled Lung Opacity, 1 rejected or unreadable, "
    told += "1 that the results do not have"
    assert point.summary().endswith(f"\nlabelled films not counted: {told}")


def test_every_kind_of_film_that_is_not_counted_is_told():
    shares = [
        Metric("all", f"decision_{name}", "x", 0.9, None, None, 9)
        for name in ("sensitivity", "specificity")
    ]
    point = PickedPoint(
        0.5, images=90, metrics=tuple(shares), intervals="none", unknown_patients=4, left_out=5,
        of_no_class={**{f"label {n}": n for n in (1, 2, 3, 7, 6, 5, 4)}}, unscored=6,
        of_several_images=7, absent=8,
    )  # fmt: skip
    assert point.summary().splitlines() == [
        "positive from 0.5000; sensitivity 0.9000, specificity 0.9000 on 90 films",
        "95 % intervals: none; 4 films have no known patient; on the films that it was picked on: "
        "use `evaluate` to measure it on others",
        "labelled films not counted: 7 labelled label 7, 6 labelled label 6, 5 labelled label 5, "
        "4 labelled label 4, 3 labelled label 3, 3 of other labels, 5 that the model was trained "
        "on, 6 rejected or unreadable, 7 in files of several images, any of which the label may "
        "mean, 8 that the results do not have",
    ]
    assert (
        len(
            replace(point, of_no_class={}, left_out=0, unscored=0, of_several_images=0, absent=0)
            .summary()
            .splitlines()
        )
        == 2
    )


def test_a_score_of_what_an_object_once_held_sets_no_threshold(site, tmp_path):
    """The label is of what lies there now, and that could not be read. Labels that a newer run was
    given go before those of an older one."""
    archive, model, results = (
        str(tmp_path / "archive"),
        str(site / "model"),
        str(tmp_path / "results"),
    )
    shutil.copytree(site / "archive", archive)
    right = str(site / "labels.csv")
    labels = pd.read_csv(right)
    other = {"Normal": "Lung_Opacity", "Lung_Opacity": "Normal"}
    labels.assign(label=labels["label"].map(other)).to_csv(tmp_path / "wrong.csv", index=False)
    lungopacity.screen(archive, model, results, run_id="before", labels=str(tmp_path / "wrong.csv"))
    _an_hour_ahead(results)  # the clock of then: it was set back since
    open_store(archive).write("x/01.png", b"broken since")
    open_store(archive).write("x/04.png", tiff_of_pages([grey_film(4), grey_film(5)]))
    lungopacity.screen(archive, model, results, run_id="after", labels=right)
    point = lungopacity.threshold(model, results, "youden", "of-now", labels=right)
    assert (point.images, point.unscored, point.of_several_images) == (FILMS - 2, 1, 1)
    words = (
        "1 rejected or unreadable, 1 in files of several images, any of which the label may mean"
    )
    assert f"labelled films not counted: {words}" in point.summary()
    told = lungopacity.threshold(model, results, "youden", "of-the-newest-labels")
    assert (told.threshold, told.sensitivity, told.unscored, told.of_several_images) == (
        point.threshold, point.sensitivity, 1, 1,
    )  # fmt: skip


def _an_hour_ahead(results: str) -> None:
    """Of all rows."""
    (path,) = Path(results, "predictions").rglob("*.parquet")
    rows = pq.ParquetFile(path).read()
    times = pc.add(rows["screened_at"], pa.scalar(timedelta(hours=1), pa.duration("us")))
    place = rows.schema.get_field_index("screened_at")
    pq.write_table(rows.set_column(place, rows.field("screened_at"), times), path)


def test_a_name_is_given_once_and_must_be_one(site):
    model, results = str(site / "model"), str(site / "results")
    lungopacity.threshold(model, results, "youden", "taken", run_id="first")
    for name, said in (
        ("taken", "already; choose another --name"),
        ("../x", "letters, digits"),
        ("", "letters"),
    ):
        with pytest.raises(UserError, match=said):
            lungopacity.threshold(model, results, "sensitivity=0.8", name, run_id="first")


def test_input_that_gives_no_threshold_is_refused(site, tmp_path):
    model, results = str(site / "model"), str(site / "results")
    few = pd.read_csv(site / "labels.csv").head(40)
    few.to_csv(tmp_path / "few.csv", index=False)
    few.head(1).assign(image="a film").to_csv(tmp_path / "others.csv", index=False)
    few.assign(label=" " + few["label"]).to_csv(tmp_path / "spaced.csv", index=False)
    write_tiny_model(str(tmp_path / "other"), seed=5)
    for arguments, options, said in (
        ((model, results, "best", "x"), {}, "is not a rule"),
        (
            (model, results, "youden", "x"),
            {"run_id": "absent"},
            "no scores .* with labels in run 'absent'",
        ),
        (
            (model, results, "youden", "x"),
            {"run_id": "first", "labels": str(tmp_path / "few.csv")},
            r"14 are labelled Lung_Opacity and 26 otherwise; 30 of each are needed$",
        ),
        (
            (model, results, "youden", "x"),
            {"run_id": "first", "labels": str(tmp_path / "spaced.csv")},
            "; labelled films not counted: 26 labelled ' Normal', 14 labelled ' Lung_Opacity'; the "
            "model knows the labels Normal, Lung_Opacity$",
        ),
        (
            (model, results, "youden", "x"),
            {"run_id": "absent", "labels": str(tmp_path / "few.csv")},
            "in run 'absent'; screen with this model first .* lists the runs",
        ),
        (
            (model, results, "youden", "x"),
            {"run_id": "first", "labels": str(tmp_path / "others.csv")},
            "names none of the 90 films .* it names 'a film', .* 'x/00.png'",
        ),
        ((str(tmp_path / "other"), results, "youden", "x"), {}, "no scores of model"),
    ):
        with pytest.raises(UserError, match=said):
            lungopacity.threshold(*arguments, **options)


def test_another_models_threshold_is_refused(site, tmp_path):
    lungopacity.threshold(
        str(site / "model"), str(site / "results"), "youden", "moved", run_id="first"
    )
    write_tiny_model(str(tmp_path / "other"), seed=5)
    shutil.copytree(site / "model" / "operating_points", tmp_path / "other" / "operating_points")
    for name, said in (
        ("moved", "was chosen for model"),
        ("absent", "has no operating point 'absent'; it has .*moved"),
    ):
        with pytest.raises(UserError, match=said):
            lungopacity.screen(
                str(site / "archive"), str(tmp_path / "other"), str(tmp_path / "results"),
                operating_point=name,
            )  # fmt: skip
    (tmp_path / "other" / "operating_points" / "moved.json").write_text('{"threshold": 3}')
    with pytest.raises(UserError, match="is damaged"):
        lungopacity.screen(
            str(site / "archive"), str(tmp_path / "other"), str(tmp_path / "results"),
            operating_point="moved",
        )  # fmt: skip
