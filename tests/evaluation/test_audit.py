"""Audits of labelled films with planted faults."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import lungopacity
import lungopacity.evaluation.audit as auditing
from lungopacity import progress
from lungopacity.archive.phantom_film import draw_body, draw_film
from lungopacity.cli import main
from lungopacity.dataset.manifest import assign_splits
from lungopacity.dataset.pixels import LabelledPixels
from lungopacity.errors import UserError
from lungopacity.evaluation.audit import (
    READ_SIDE,
    Audit,
    correlations,
    near_pairs,
    perceptual_hashes,
)
from lungopacity.radiograph import Preprocessing
from lungopacity.storage import open_store
from tests.films import encoded, grey_film

FILMS = 60


def write_films(folder, spoil=None) -> tuple[str, str]:
    """An archive and its labels; `spoil` changes both before they are written."""
    films = {f"{number:02}.png": grey_film(number, 128, 120) for number in range(FILMS)}
    labels = pd.DataFrame(
        {
            "image": list(films),
            "label": [("Normal", "Lung_Opacity")[number % 2] for number in range(FILMS)],
            "split": [("train", "train", "validation", "test")[n // 2 % 4] for n in range(FILMS)],
            "patient_id": [f"p{number}" for number in range(FILMS)],
            "view_position": [
                ("PA", "AP")[(number % 2) ^ (number % 10 == 0)] for number in range(FILMS)
            ],
            "patient_sex": [("M", "F")[number // 2 % 2] for number in range(FILMS)],
        }
    ).set_index("image", drop=False)
    if spoil is not None:
        spoil(films, labels)
    store = open_store(str(folder / "archive"))
    for name, film in films.items():
        store.write(name, encoded(film))
    labels.to_csv(folder / "labels.csv", index=False)
    return str(folder / "archive"), str(folder / "labels.csv")


def darker_and_smaller(film: np.ndarray) -> np.ndarray:
    darker = Image.fromarray((film.astype(float) * 0.8).astype(np.uint8))
    return np.asarray(darker.resize((100, 107), Image.Resampling.BICUBIC))


@pytest.mark.usefixtures("ray_cluster")
def test_sound_films_pass_and_a_shortcut_is_named(tmp_path):
    archive, labels = write_films(tmp_path)
    found = lungopacity.audit([archive], labels, output=str(tmp_path / "report"))
    assert not found.leaks
    assert (found.images, found.copies, found.torn_patients) == (FILMS, (), 0)
    aucs = {item.fact: item.auc for item in found.shortcuts}
    assert aucs["view_position"] > 0.8
    assert 0.2 < aucs["patient_sex"] < 0.7
    assert 0.2 < aucs["border of the film alone"] < 0.8
    assert "rows x columns" not in aucs  # all alike
    text = found.summary()
    assert "no leakage found" in text
    assert "<- a model may rely on it" in next(
        line for line in text.splitlines() if "view_position" in line
    )
    kept = json.loads((tmp_path / "report" / "audit.json").read_text())
    assert kept["leaks"] is False
    assert kept["intervals"].startswith("percentile bootstrap over 60 patients of 60 films")
    assert {item["ci_method"] for item in kept["shortcuts"]} == {"bootstrap"}
    assert kept["intervals"] in text
    assert "Research use only" in kept["notice"]


@pytest.mark.usefixtures("ray_cluster")
def test_planted_copies_conflicts_and_torn_patients_are_found(tmp_path, capsys):
    def spoil(films, labels):
        films["01.png"] = films["00.png"]  # train and train, two labels
        films["06.png"] = films["02.png"]  # train and test, one label
        films["07.png"] = films["12.png"]  # test and train, two labels
        films["04.png"] = darker_and_smaller(films["08.png"])  # validation and train
        labels.loc["10.png", "patient_id"] = "p14"  # train and test

    archive, labels = write_films(tmp_path, spoil)
    assert main(["audit", "--images", archive, "--labels", labels, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    pairs = {(item["first"], item["second"]): item for item in found["copies"]}
    assert set(pairs) == {
        ("00.png", "01.png"),
        ("02.png", "06.png"),
        ("04.png", "08.png"),
        ("07.png", "12.png"),
    }
    assert pairs["00.png", "01.png"]["labels"] == ["Normal", "Lung_Opacity"]
    assert pairs["02.png", "06.png"]["splits"] == ["train", "test"]
    assert pairs["02.png", "06.png"]["kind"] == "exact"
    assert pairs["04.png", "08.png"]["kind"] == "near"
    assert found["torn_patients"] == 1
    torn = [{"first": "10.png", "second": "14.png", "splits": ["train", "test"]}]
    assert found["torn"] == torn, "which films they are, and not who"

    assert main(["audit", "--images", archive, "--labels", labels]) == 1
    text = capsys.readouterr().out
    assert "across splits: 3; with two labels: 2" in text
    assert text.count("07.png") == 1, "a pair of both kinds is one pair"
    assert "near: 04.png (Normal, validation) = 08.png (Normal, train)" in text
    assert "  one patient: 10.png (train), 14.png (test)\n" in text
    assert "p14" not in text
    assert "leakage found" in text


@pytest.mark.usefixtures("ray_cluster")
def test_blank_films_are_counted_and_are_no_copies_of_each_other(tmp_path):
    def spoil(films, labels):
        for number in (3, 9, 12, 20, 33):
            films[f"{number:02}.png"] = np.full((128, 120), 40 + number, np.uint8)
        films["50.png"] = darker_and_smaller(films["42.png"])

    archive, labels = write_films(tmp_path, spoil)
    found = lungopacity.audit([archive], labels, reject_quality=[])
    assert [(pair.first, pair.second) for pair in found.copies] == [("42.png", "50.png")]
    assert (found.images, found.blank) == (FILMS, 5)
    assert "blank films: 5;" in found.summary()


@pytest.mark.usefixtures("ray_cluster")
def test_a_border_that_knows_the_label_is_found(tmp_path):
    def spoil(films, labels):
        for name, label in zip(labels["image"], labels["label"], strict=True):
            film = films[name] = films[name].copy()
            film[:6, :40] = 255 if label == "Normal" else 0  # a burnt-in marker
        labels["site"] = labels["label"].map({"Normal": "North", "Lung_Opacity": "South"})
        labels["scanner"] = labels["label"].map({"Normal": "Fuji", "Lung_Opacity": "GE"})
        labels["note"] = labels["scanner"]

    archive, labels = write_films(tmp_path, spoil)
    found = lungopacity.audit([archive], labels, by=["scanner", "site"])
    aucs = {item.fact: item.auc for item in found.shortcuts}
    assert aucs["border of the film alone"] > 0.95
    assert aucs["site"] == aucs["scanner"] == 1
    assert "note" not in aucs  # nobody asked for it


@pytest.mark.parametrize("positive", [None, "Lung_Opacity"])
def test_each_of_three_classes_is_told_from_the_rest(tmp_path, monkeypatch, positive):
    """Without a cluster: what is read is made up. A few films are lost, and the others are in
    another order."""

    def made_up(_uris, frame, names, _rules, _labels):
        frame = frame.sample(frac=0.9, random_state=0)
        images = frame.assign(
            content_sha256=frame["image"], source="x.tar", format="png", rows=64, columns=64,
            photometric_interpretation=None, quality_blank=False,
        )  # fmt: skip
        pixels = np.random.default_rng(0).integers(0, 256, (len(frame), 64, 64), dtype=np.uint8)
        labels_N = frame["label"].map(list(names).index).to_numpy()
        return LabelledPixels(
            pixels,
            labels_N,
            frame["split"].to_numpy(str),
            names,
            images,
            frame[:0],
            frame[:0],
            False,
        )

    monkeypatch.setattr(auditing, "ray_session", contextlib.nullcontext)
    monkeypatch.setattr(auditing, "load_pixels", made_up)
    labels = ["COVID", "Lung_Opacity", "Normal"] * 20
    sites = [{"COVID": "A"}.get(label, "BC"[n % 2]) for n, label in enumerate(labels)]
    frame = pd.DataFrame({"image": [f"{n}.png" for n in range(60)], "label": labels})
    frame.assign(split="test", site=sites).to_csv(tmp_path / "labels.csv", index=False)
    found = auditing.audit(["films"], str(tmp_path / "labels.csv"), positive_class=positive)
    of_site = {item.class_name: item.auc for item in found.shortcuts if item.fact == "site"}
    assert set(of_site) == ({positive} if positive else set(labels))
    assert of_site.get("COVID", 1.0) == 1.0
    assert found.images == 54
    told = next(line for line in found.summary().splitlines() if line.startswith("  site "))
    assert told.endswith("for COVID  <- a model may rely on it") == (positive is None)
    for low, words in (
        (0.5, "may be chance"),
        (0.501, "a model may rely on it"),
        (None, "a model"),
    ):
        few = replace(found.shortcuts[0], fact="scanner", auc=0.7, ci_low=low, ci_high=0.9)
        assert f"  <- {words}" in replace(found, shortcuts=(few,)).summary()
        assert "<-" not in replace(found, shortcuts=(replace(few, auc=0.69),)).summary()
    forged = replace(found.shortcuts[0], fact="a\nno leakage found")
    assert r"  a\nno leakage" in replace(found, shortcuts=(forged,)).summary()
    assert found.positive_class == positive


def test_an_unknown_positive_class_is_refused(tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("image,label,split\na,Normal,train\nb,Lung_Opacity,train\n")
    with pytest.raises(UserError, match=r"'Lung_opacity' is not one of .*Lung_Opacity, Normal"):
        lungopacity.audit([str(tmp_path)], str(labels), positive_class="Lung_opacity")


def test_an_unusable_predictor_is_refused(tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("image,label,split\na,Normal,train\nb,Lung_Opacity,train\n")
    with pytest.raises(UserError, match=r"--by patient_id: cannot form subgroups"):
        lungopacity.audit([str(tmp_path)], str(labels), by=["patient_id"])
    with pytest.raises(UserError, match=r"has no column 'scanner' \(it has: image, label, split\)"):
        lungopacity.audit([str(tmp_path)], str(labels), by=["scanner"])


@pytest.mark.usefixtures("ray_cluster")
def test_without_splits_and_patients_copies_leak_where_training_would_part_them(tmp_path):
    near, exact = [], []

    def spoil(films, labels):
        labels.drop(columns=["split", "patient_id"], inplace=True)
        bare = labels.assign(split=None, patient_id=None)
        split = assign_splits(bare, "labels", seed=0)["split"]
        healthy = labels.index[labels["label"] == "Normal"]
        train, test = ([name for name in healthy if split[name] == s] for s in ("train", "test"))
        near.extend((train[0], test[0]))
        films[near[1]] = darker_and_smaller(films[near[0]])
        exact.extend(train[1:3])
        films[exact[1]] = films[exact[0]]

    archive, labels = write_films(tmp_path, spoil)
    found = lungopacity.audit([archive], labels, classes=["Lung_Opacity", "Normal=Healthy"])
    assert "border of the film alone" in {item.fact for item in found.shortcuts}
    assert found.unknown_patients == FILMS
    assert {item.kind: {item.first, item.second} for item in found.copies} == {
        "near": set(near),
        "exact": set(exact),
    }
    assert found.copies[0].labels == ("Healthy", "Healthy")
    assert found.leaks
    assert [set(pair.splits) for pair in found.leaking] == [{"train", "test"}]
    assert "leakage found, across the splits that `train` would make" in found.summary()
    assert "remove copies, or give them one patient_id" in found.summary()


def test_each_copy_is_told_once_and_blank_films_are_none_but_of_the_same_bytes():
    films = [chest(number) for number in range(3)]
    blank = np.full((READ_SIDE, READ_SIDE), 9, np.uint8)
    read = Preprocessing(READ_SIDE)
    shown = [read.square(film) for film in (*films, films[1], films[1] // 2)]
    # `b` is there three times, and `e` is a darker copy of it.
    frame = pd.DataFrame(
        {
            "image": list("abcdefghi"),
            "content_sha256": ["a", "b", "c", "b", "e", "b", "g", "h", "h"],
            "quality_blank": [False] * 6 + [True] * 3,
            "split": ["train", "test"] * 4 + ["train"],
            "label": ["sick"] * 4 + ["well"] * 5,
        }
    )
    pixels_NHW = np.stack([*shown, shown[1], blank, blank, blank])
    nothing = frame[:0]
    data = LabelledPixels(
        pixels_NHW, np.zeros(9, int), np.full(9, "x"), ("a", "b"), frame, nothing, nothing, False
    )
    found = [
        (pair.kind, pair.first + pair.second, pair.splits, pair.labels)
        for pair in auditing._copies(data)
    ]
    assert found == [
        ("exact", "bd", ("test", "test"), ("sick", "sick")),
        ("exact", "bf", ("test", "test"), ("sick", "well")),
        ("exact", "hi", ("test", "train"), ("well", "well")),
        ("near", "be", ("test", "train"), ("sick", "well")),
    ]


@pytest.mark.usefixtures("ray_cluster")
def test_where_one_patient_has_every_opacity_no_fact_is_tried(tmp_path, caplog):
    def spoil(films, labels):
        labels.loc[labels["label"] == "Lung_Opacity", ["patient_id", "split"]] = ["one", "train"]

    found = lungopacity.audit([write_films(tmp_path, spoil)[0]], str(tmp_path / "labels.csv"))
    assert found.shortcuts == ()
    assert "one patient has all its films, or all others" in caplog.text


def test_other_films_are_no_copies_and_flat_ones_are():
    rng = np.random.default_rng(0)
    films = np.stack([grey_film(number, 64, 64) for number in range(200)])
    assert list(near_pairs(films)) == []
    noisy = np.clip(films[:3] + rng.normal(0, 2, (3, 64, 64)), 0, 255).astype(np.uint8)
    assert list(near_pairs(np.concatenate([films, noisy]))) == [(0, 200), (1, 201), (2, 202)]
    flat = np.full((2, 64, 64), 7, np.uint8)
    assert list(near_pairs(flat)) == [(0, 1)]


def test_pixels_are_correlated_as_numpy_does_and_flat_ones_only_with_the_same():
    rng = np.random.default_rng(0)
    films = rng.integers(0, 256, (9, 64, 64), dtype=np.uint8)
    films[5] = films[0] // 2
    films[6:] = np.array([7, 7, 8], np.uint8)[:, None, None]
    expected = [np.corrcoef(films[0].ravel(), other.ravel())[0, 1] for other in films[:6]]
    found = correlations(films[0], films)
    np.testing.assert_allclose(found, [*expected, 0, 0, 0], atol=1e-5)
    assert correlations(films[6], films).tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 0]
    assert correlations(films[0], films[:0]).tolist() == []


def test_each_film_that_was_compared_is_told(monkeypatch, caplog):
    """Of many films, the first of the four rounds takes minutes."""
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    with caplog.at_level("INFO"):
        list(near_pairs(np.stack([grey_film(number, 64, 64) for number in range(5)])))
    told = [line for line in caplog.messages if line.startswith("Comparing images: ")]
    assert [line.split(" comparisons, ")[0].split(": ")[1] for line in told] == [
        f"{number} of 20" for number in range(1, 21)
    ]


@pytest.mark.parametrize(
    "change", ["mirrored", "bordered", "mirrored in a border", "stretched", "mirrored, stretched"]
)
def test_a_film_that_was_mirrored_framed_or_stretched_is_a_copy(change):
    films = [chest(number) for number in range(12)]
    copy = films[3][:, ::-1] if "mirrored" in change else films[3]
    if "border" in change:
        frame = np.zeros((504, 480), np.uint8)
        frame[20 : 20 + copy.shape[0], 12 : 12 + copy.shape[1]] = copy
        copy = frame
    if "stretched" in change:
        # Many sets hold films that were resized to one shape, whatever theirs was.
        copy = np.asarray(Image.fromarray(np.ascontiguousarray(copy)).resize((200, 256)))
    read = Preprocessing(READ_SIDE)
    squares = np.stack([read.square(np.ascontiguousarray(film)) for film in [*films, copy]])
    assert list(near_pairs(squares)) == [(3, 12)]


def chest(number: int) -> np.ndarray:
    """A phantom film, 8 bits."""
    rng = np.random.default_rng(number)
    film = draw_film(rng, draw_body(rng, "F", 50), "PA").pixels
    return (film >> 4).astype(np.uint8)


def test_a_hash_is_of_64_bits_and_bears_brightness():
    film = grey_film(1, 64, 64)
    lighter = (film.astype(float) * 0.7 + 20).astype(np.uint8)
    hashes = perceptual_hashes(np.stack([film, lighter, 255 - film]))
    assert hashes.dtype == np.uint64
    assert np.bitwise_count(hashes[0] ^ hashes[1]) <= 2
    assert np.bitwise_count(hashes[0] ^ hashes[2]) > 50


def test_a_patient_in_two_splits_alone_is_leakage():
    found = Audit(
        images=10, unreadable=0, rejected=0, blank=0, torn=(), unknown_patients=0,
        copies=(), shortcuts=(), positive_class="Lung_Opacity", intervals="", split_given=True,
    )  # fmt: skip
    assert not found.leaks
    assert "\nno leakage found\n" in found.summary()
    one = auditing.TornPatient("a.png", "b.png", ("train", "test"))
    torn = replace(found, torn=(one,))
    assert torn.leaks
    assert "\nleakage found; give all films of a patient one split\n" in torn.summary()
    assert "other patient" not in replace(found, torn=(one,) * 10).summary()
    many = replace(found, torn=(one,) * 12).summary()
    assert many.count("  one patient: a.png (train), b.png (test)\n") == 10
    assert "\n  2 other patients: --json shows all\n" in many


def test_pairs_of_copies_that_are_not_shown_are_counted():
    across, within = ("train", "test"), ("train", "train")
    pairs = [auditing.Copies(f"{n}.png", "x.png", "near", across, ("a", "a")) for n in range(11)]
    found = Audit(
        images=10, unreadable=0, rejected=0, blank=0, torn=(), unknown_patients=0,
        copies=tuple(pairs), shortcuts=(), positive_class="a", intervals="", split_given=True,
    )  # fmt: skip
    shown = found.summary()
    assert (shown.count("x.png"), "  1 other pair: --json shows all" in shown) == (10, True)
    inside = replace(found, copies=(replace(pairs[0], splits=within),) * 2)
    assert "  2 other pairs: --json shows all" in inside.summary()
    assert "other pair" not in replace(found, copies=tuple(pairs[:10])).summary()
    # However many leak, those with a wrong label are told, too.
    wrong = auditing.Copies("y.png", "z.png", "exact", within, ("a", "b"))
    assert "  exact: y.png (a, train) = z.png (b, train)\n" in (
        replace(found, copies=(*pairs, wrong)).summary()
    )
