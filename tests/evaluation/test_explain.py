"""`lungopacity explain`, from films of every kind to pictures, rows and the pointing game."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

import lungopacity
from lungopacity.archive.phantom import PhantomSettings, write_phantom_archive
from lungopacity.cli import main
from lungopacity.errors import NOTICE, UserError
from lungopacity.models import OperatingPoint
from lungopacity.models.scorer import Scorer, Scores
from lungopacity.radiograph import Preprocessing
from lungopacity.results.schema import EXPLANATIONS_SCHEMA
from lungopacity.storage import open_store
from tests.films import dicom, encoded, grey_film, one_film, saved, tar
from tests.models.tiny import write_tiny_model


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Loose films and a shard, with labels and boxes, and a model."""
    folder = tmp_path_factory.mktemp("phantoms")
    settings = PhantomSettings(images=14, image_size=96, opacity_fraction=0.6)
    write_phantom_archive(open_store(str(folder)), settings)
    write_tiny_model(str(folder / "model"), image_size=64)
    return folder


def test_the_command_explains_an_archive_and_plays_the_pointing_game(phantoms, tmp_path, capfd):
    output = tmp_path / "out"
    code = main(
        ["explain", "--model", f"{phantoms}/model", "--images", f"{phantoms}/archive",
         "--labels", f"{phantoms}/labels.csv", "--split", "all",
         "--boxes", f"{phantoms}/boxes.csv", "--output", str(output), "--json"]
    )  # fmt: skip
    out, err = capfd.readouterr()
    assert code == 0, err
    told = json.loads(out)
    assert (told["explained"], told["failed"], told["notice"]) == (14, 0, NOTICE)
    table = pq.read_table(output / "explain.parquet")
    assert table.schema.equals(EXPLANATIONS_SCHEMA, check_metadata=True)
    rows = table.to_pandas().assign(name=lambda t: t["member"].fillna(t["image"]))
    labels = pd.read_csv(phantoms / "labels.csv").set_index("image")["label"]
    boxes = pd.read_csv(phantoms / "boxes.csv").groupby("image").size()
    assert rows.set_index("name")["label"].to_dict() == labels.to_dict()
    assert rows.set_index("name")["boxes"].to_dict() == {
        name: boxes.get(name, 0) for name in labels.index
    }
    # The same numbers as anywhere else, a picture each, and where the highest place is.
    assert rows["synthetic"].all()
    for row in rows.itertuples():
        picture = Image.open(output / row.overlay)
        assert picture.size[0] == 512
        assert row.hit is None or row.boxes > 0
    shown = rows[rows["peak_x"].notna()]
    assert shown[["peak_x", "peak_y"]].apply(lambda column: column.between(0, 96)).all().all()
    with_boxes = rows[rows["boxes"] > 0]
    metrics = pq.read_table(output / "metrics.parquet").to_pandas()
    game = metrics[metrics["group"] == "all"].set_index("metric")
    assert game.loc["pointing_game", "value"] == pytest.approx(with_boxes["hit"].mean())
    assert game.loc["pointing_game", "n"] == len(with_boxes) == told["with_boxes"]
    assert game.loc["pointing_game_chance", "value"] == pytest.approx(with_boxes["chance"].mean())
    assert game.loc["energy_in_boxes", "value"] == pytest.approx(with_boxes["energy"].mean())
    who = pd.read_csv(phantoms / "labels.csv").set_index("image")["patient_id"]
    patients = who[with_boxes["name"]].nunique()
    assert game.loc["energy_in_boxes", ["ci_method", "patients"]].tolist() == [
        "bootstrap",
        patients,
    ]
    assert f"over {patients} patients of {len(with_boxes)} films" in told["intervals"]
    assert told["unknown_patients"] == 0
    called = with_boxes[with_boxes["decision"] == "positive"]
    of_called = metrics[metrics["group"] == "decision=positive"]
    assert set(of_called["n"]) == ({len(called)} if len(called) else set())


def test_p_is_that_of_the_scorer_and_the_boxes_are_in_the_films_own_pixels(tmp_path):
    """A film that is padded to a square, and shrunk to it."""
    film = grey_film(height=200, width=320)
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.png").write_bytes(encoded(film))
    for_review = OperatingPoint(1.0, review_from=0.0)
    model = write_tiny_model(
        str(tmp_path / "model"), image_size=64, seed=2, operating_point=for_review
    )
    explain = {"model": str(tmp_path / "model"), "images": [str(tmp_path / "films")]}
    (tmp_path / "none.csv").write_text("image,x,y,width,height\nb.png,1,1,1,1\n")
    result = lungopacity.explain(
        **explain, output=str(tmp_path / "out"), boxes=str(tmp_path / "none.csv")
    )
    (row,) = result.table.to_pylist()
    assert (row["boxes"], row["hit"], result.metrics) == (0, None, [])
    scorer = Scorer(model)
    square = model.spec.preprocessing.square(film)
    p = scorer.probabilities(scorer.logits(square[None]))[0, 1]
    assert row["p"] == pytest.approx(float(p), abs=1e-6)
    assert (row["rows"], row["columns"]) == (200, 320)
    x, y = row["peak_x"], row["peak_y"]
    # A pixel of the square is 5 of the film.
    (tmp_path / "a.csv").write_text(
        f"image,x,y,width,height\na.png,{x - 3},{y - 3},6,6\na.png,0,0,1,1\n"
    )
    # The tolerance is 13.4 pixels of the film, of its shorter side.
    for name, right in (("b", 4), ("c", 17)):
        box = f"{x + right},{y - 3},6,6"
        (tmp_path / f"{name}.csv").write_text(f"image,x,y,width,height\na.png,{box}\n")
    for name, hit, near in (("a", True, True), ("b", False, True), ("c", False, False)):
        again = lungopacity.explain(
            **explain, output=str(tmp_path / name), boxes=str(tmp_path / f"{name}.csv")
        )
        (found,) = again.table.to_pylist()
        assert (found["hit"], found["hit_with_tolerance"]) == (hit, near)
        assert found["chance"] < 0.01
        assert again.value("pointing_game") == float(hit)
        _, title, exact, tolerant, energy, *_ = again.summary().splitlines()
        assert title == "  1 film with boxes"
        for line, start, of in (
            (exact, "highest point in a box", "pointing_game_chance"),
            (tolerant, "  within 15 pixels of 224", "pointing_game_with_tolerance_chance"),
            # A map that is the same everywhere has as much in boxes as these cover.
            (energy, "share of the map in boxes", "pointing_game_chance"),
        ):
            assert line.startswith(f"    {start} ")
            assert f"; chance {again.value(of):.3f}" in line
        # It is under review, and not decided positive.
        assert {item.group for item in again.metrics} == {"all"}
        assert (
            "over 1 patients of 1 films, 1,000 replicates, seed 0; 1 films have no patient_id"
            in (again.summary())
        )
    with pytest.raises(KeyError):
        result.value("pointing_game")


def test_a_film_that_is_turned_or_has_oblong_pixels_keeps_its_frame(tmp_path):
    turned = Image.fromarray(grey_film(height=80, width=120))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned_png = saved(turned, exif=exif)
    oblong = dicom(grey_film(height=60, width=100).astype(np.uint16) * 16, PixelAspectRatio=[2, 1])
    assert one_film(turned_png).pixels.shape == (120, 80)
    assert one_film(oblong).pixels.shape == (60, 50)
    store = open_store(str(tmp_path / "films"))
    store.write("oblong.dcm", oblong)
    store.write("turned.png", turned_png)
    # The left half of each as it is shown; of oblong pixels, 50 columns of the stored ones.
    (tmp_path / "boxes.csv").write_text(
        "image,x,y,width,height\noblong.dcm,0,0,50,60\nturned.png,0,0,40,120\n"
    )
    write_tiny_model(str(tmp_path / "model"), image_size=64, seed=3)
    result = lungopacity.explain(
        str(tmp_path / "model"), [str(tmp_path / "films")], str(tmp_path / "out"),
        boxes=str(tmp_path / "boxes.csv"), reject_quality=[],
    )  # fmt: skip
    for row, width, height in zip(result.table.to_pylist(), (100, 80), (60, 120), strict=True):
        assert row["chance"] == pytest.approx(0.5, abs=0.02)
        assert 0 < row["peak_x"] < width
        assert 0 < row["peak_y"] < height
        assert row["hit"] == (row["peak_x"] < width / 2)


def test_what_was_cut_away_is_counted_when_places_are_told(tmp_path):
    film = np.pad(grey_film(height=200, width=160).clip(30, None), ((40, 0), (100, 20)))
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.png").write_bytes(encoded(film))
    # All that is left of the film, and its upper half.
    (tmp_path / "boxes.csv").write_text(
        "image,x,y,width,height\na.png,100,40,160,200\na.png,100,40,160,100\n"
    )
    (tmp_path / "half.csv").write_text("image,x,y,width,height\na.png,100,40,160,100\n")
    preprocessing = Preprocessing(image_size=64, crop_borders=True)
    write_tiny_model(str(tmp_path / "model"), preprocessing=preprocessing, seed=3)
    for name, chance in (("boxes", 1.0), ("half", 0.5)):
        result = lungopacity.explain(
            str(tmp_path / "model"), [str(tmp_path / "films")], str(tmp_path / "out"),
            boxes=str(tmp_path / f"{name}.csv"),
        )  # fmt: skip
        (row,) = result.table.to_pylist()
        assert row["chance"] == pytest.approx(chance, abs=0.02)
        assert 100 < row["peak_x"] < 260
        assert 40 < row["peak_y"] < 240
        assert row["hit"] == (chance == 1 or row["peak_y"] < 140)
    for right, hit in ((-4, True), (8, False)):
        box = f"{row['peak_x'] + right},{row['peak_y'] - 4},8,8"
        (tmp_path / "peak.csv").write_text(f"image,x,y,width,height\na.png,{box}\n")
        found = lungopacity.explain(
            str(tmp_path / "model"), [str(tmp_path / "films")], str(tmp_path / "out"),
            boxes=str(tmp_path / "peak.csv"),
        )  # fmt: skip
        assert found.value("pointing_game") == float(hit)


def test_the_output_is_named_as_it_was_given(phantoms, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    options = ["--model", f"{phantoms}/model", "--images", f"{phantoms}/archive", "--limit", "1"]
    assert main(["explain", *options, "--output", "out"]) == 0
    assert "\npictures and explain.parquet in out\n" in capfd.readouterr().out


def test_one_loose_image_is_an_archive_of_one(store_uri, tmp_path):
    store = open_store(store_uri)
    store.write("films/deep/a film.png", encoded(grey_film(3)))
    store.write("films/deep/another.png", encoded(grey_film(4)))
    write_tiny_model(str(tmp_path / "model"))
    result = lungopacity.explain(
        str(tmp_path / "model"), [f"{store_uri}/films/deep/a film.png"], f"{store_uri}/out"
    )
    (row,) = result.table.to_pylist()
    assert (row["image"], row["status"], result.exit_code) == ("a film.png", "ok", 0)
    # The name of an object, which may be that of a patient, does not go with the picture.
    assert row["overlay"] == f"overlays/00000-{row['content_sha256'][:12]}.png"
    assert store.head(f"out/{row['overlay']}") is not None
    assert row["boxes"] is None


def test_what_cannot_be_read_has_a_row_and_the_exit_code(tmp_path, capfd):
    store = open_store(str(tmp_path / "films"))
    store.write("a.png", encoded(grey_film(1)))
    store.write("b.png", b"\x89PNG\r\n\x1a\n")
    store.write("c.dcm", dicom(grey_film().astype(np.uint16) * 16, ViewPosition="LL"))
    store.write("x.tar", tar({"in.png": encoded(grey_film(2)), "zero.png": b""}))
    write_tiny_model(str(tmp_path / "model"))
    run = ["explain", "--model", str(tmp_path / "model"), "--images", str(tmp_path / "films")]
    code = main([*run, "--output", str(tmp_path / "out")])
    out, _ = capfd.readouterr()
    assert code == 1
    assert "2 images explained, 1 rejected, 2 could not be read" in out
    assert "\n  corrupt_image: 1\n" in out
    rows = pq.read_table(tmp_path / "out" / "explain.parquet").to_pylist()
    assert {row["member"] or row["image"]: row["error_code"] for row in rows} == {
        "a.png": None, "b.png": "corrupt_image", "c.dcm": "lateral_view", "in.png": None,
        "zero.png": "empty",
    }  # fmt: skip
    assert all((row["overlay"] is None) == (row["status"] != "ok") for row in rows)
    code = main([*run, "--output", str(tmp_path / "two"), "--limit", "1"])
    assert code == 0
    assert pq.read_table(tmp_path / "two" / "explain.parquet")["image"].to_pylist() == ["a.png"]
    # Labelled images that no archive has are rows, too.
    (tmp_path / "labels.csv").write_text(
        "image,label,split\nin.png,Normal,test\ngone.png,Lung_Opacity,test\na.png,Normal,train\n"
    )
    (tmp_path / "boxes.csv").write_text("image,x,y,width,height\ngone.png,1,1,5,5\n")
    labelled = [*run, "--labels", str(tmp_path / "labels.csv")]
    code = main(
        [*labelled, "--output", str(tmp_path / "three"), "--boxes", str(tmp_path / "boxes.csv")]
    )
    assert code == 1
    told = "none of the 1 images in the boxes file was explained, such as gone.png: --limit or --s"
    assert told in capfd.readouterr().err
    rows = pq.read_table(tmp_path / "three" / "explain.parquet").to_pylist()
    assert [(row["member"] or row["image"], row["label"], row["error_code"]) for row in rows] == [
        ("in.png", "Normal", None),
        ("gone.png", "Lung_Opacity", "missing"),
    ]
    # Labels and boxes may have a folder that the archive has not; the picture has the file's name.
    store.write("y/d.png", encoded(grey_film(5)))
    (tmp_path / "labels.csv").write_text(
        "image,label,split\nset/y/d.png,Normal,test\nin.png,Lung_Opacity,test\n"
    )
    (tmp_path / "boxes.csv").write_text("image,x,y,width,height\nset/y/d.png,1,1,500,500\n")
    code = main(
        [*labelled, "--output", str(tmp_path / "four"), "--boxes", str(tmp_path / "boxes.csv")]
    )
    assert code == 0
    rows = pq.read_table(tmp_path / "four" / "explain.parquet").to_pylist()
    assert [(row["member"] or row["image"], row["label"], row["hit"]) for row in rows] == [
        ("in.png", "Lung_Opacity", None),
        ("y/d.png", "Normal", True),
    ]
    (tmp_path / "labels.csv").write_text(
        "image,label,split\nd.png,Normal,test\nin.png,Lung_Opacity,test\n"
    )
    store.write("z/d.png", encoded(grey_film(6)))
    capfd.readouterr()
    assert main([*labelled, "--output", str(tmp_path / "five")]) == 2
    assert "as d.png may be y/d.png or z/d.png; write whole keys" in capfd.readouterr().err
    # Of two films of one name, nothing tells which one the label and the boxes are of.
    (tmp_path / "labels.csv").write_text(
        "image,label,split\nin.png,Normal,test\na.png,Lung_Opacity,test\n"
    )
    others = open_store(str(tmp_path / "others"))
    others.write("x.tar", tar({"in.png": encoded(grey_film(7))}))
    assert main([*labelled, "--images", others.uri, "--output", str(tmp_path / "six")]) == 2
    assert "1 labelled names occur more than once, such as in.png; give" in capfd.readouterr().err


def test_nothing_of_an_older_report_is_left_beside_a_new_one(tmp_path):
    films, out = open_store(str(tmp_path / "films")), tmp_path / "out"
    for name in ("a.png", "b.png"):
        films.write(name, encoded(grey_film(ord(name[0]))))
    write_tiny_model(str(tmp_path / "model"))
    model = str(tmp_path / "model")
    lungopacity.explain(model, [films.uri], str(out))
    (out / "overlays" / "notes of a user.png").write_text("kept")
    (out / "overlays" / "a.png-0123456789ab.png").write_text("of an older version")
    lungopacity.explain(model, [films.uri], str(out), limit=1)
    left = sorted(path.name[:6] for path in (out / "overlays").iterdir())
    assert left == ["00000-", "notes "]
    assert pq.read_table(out / "explain.parquet")["image"].to_pylist() == ["a.png"]
    # What evaluate writes is not mixed with it.
    (out / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match=r"kind of report \(evaluation\.json\); choose another"):
        lungopacity.explain(model, [films.uri], str(out))


def test_mistakes_are_refused_with_the_reason(tmp_path, phantoms):
    write_tiny_model(str(tmp_path / "model"))
    (tmp_path / "labels.csv").write_text(
        "image,label,split\nx.png,Normal,test\ny.png,Lung_Opacity,train\n"
    )
    films = [f"{phantoms}/archive"]
    for options, message in (
        ({"limit": 0}, "--limit must be at least 1"),
        (
            {"labels": str(tmp_path / "labels.csv")},
            "none of 1 labelled images is in .*, such as x.png",
        ),
        ({"boxes": str(tmp_path / "none.csv")}, "boxes cannot be read"),
        ({"use_gpu": True}, "--use-gpu: this machine has no GPU"),
        ({"operating_point": "no"}, "has no operating point 'no'"),
        ({"output": str(tmp_path / "labels.csv" / "x")}, r"labels\.csv: is in the way of "),
    ):
        arguments = {"output": str(tmp_path / "out"), **options}
        with pytest.raises(UserError, match=message):
            lungopacity.explain(str(tmp_path / "model"), films, **arguments)


def test_a_film_whose_score_is_no_number_is_a_failure_and_the_others_are_shown(
    tmp_path, monkeypatch
):
    films = tmp_path / "films"
    films.mkdir()
    for number in range(3):
        (films / f"{number}.png").write_bytes(encoded(grey_film(number)))
    write_tiny_model(str(tmp_path / "model"), image_size=64)
    exact = Scorer.scores

    def faulty(self: Scorer, pixels_NHW: np.ndarray) -> Scores:
        scores = exact(self, pixels_NHW)
        scores.logits_NK[1] = np.nan
        return scores

    monkeypatch.setattr(Scorer, "scores", faulty)
    result = lungopacity.explain(str(tmp_path / "model"), [str(films)], str(tmp_path / "out"))
    first, broken, last = result.table.to_pylist()
    assert (result.explained, result.failed) == (2, 1)
    assert (broken["error_code"], broken["error_stage"]) == ("internal", "score")
    assert {broken[name] for name in ("p", "decision", "overlay", "peak_x")} == {None}
    assert None not in (first["overlay"], last["overlay"])
