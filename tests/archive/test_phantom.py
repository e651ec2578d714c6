"""The phantom archive: right physics, labels that nothing gives away, valid files."""

from __future__ import annotations

import csv
import io
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
import pytest

from lungopacity.archive import phantom
from lungopacity.archive.phantom import PhantomSettings, write_phantom_archive
from lungopacity.archive.phantom_film import (
    MU_LUNG,
    MU_SOFT,
    WHITE,
    Film,
    View,
    draw_body,
    draw_film,
)
from lungopacity.archive.phantom_opacity import OPACITY_KINDS, Box, OpacityKind
from lungopacity.storage import LocalStore
from tests.films import one_film

SIZE = 96
SETTINGS = PhantomSettings(images=36, image_size=SIZE, images_per_shard=7, seed=3)


def film(seed: int, kind: OpacityKind | None = None, view: View = "PA") -> Film:
    body = draw_body(np.random.default_rng(seed), "M", 50)
    return draw_film(np.random.default_rng([seed, 1]), body, view, kind, SIZE)


def inside(values: npt.NDArray[np.float32], box: Box) -> npt.NDArray[np.float32]:
    return values[box.y : box.y + box.height, box.x : box.x + box.width]


def files_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def images_of(files: dict[str, bytes]) -> dict[str, bytes]:
    """The bytes of every film by its name in the labels."""
    found = {}
    for key, data in files.items():
        if key.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                for member in tar:
                    content = tar.extractfile(member)
                    assert content is not None
                    assert member.name not in found
                    found[member.name] = content.read()
        elif key.startswith("archive/"):
            found[key.removeprefix("archive/")] = data
    return found


def rows_of(data: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(data.decode())))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom_archive(LocalStore(folder), SETTINGS)
    return folder


@pytest.fixture(scope="module")
def files(root: Path) -> dict[str, bytes]:
    return files_of(root)


# -------------------------------------------------------------------------------------- the physics


@pytest.mark.parametrize("kind", OPACITY_KINDS)
@pytest.mark.parametrize("seed", [1, 2])
def test_an_opacity_only_adds_attenuation_and_most_of_it_in_its_boxes(kind, seed):
    added = film(seed, kind).attenuation - film(seed).attenuation
    assert added.min() >= -1e-5
    assert added.max() > 0.1
    boxes = film(seed, kind).boxes
    assert boxes
    covered = np.zeros_like(added, dtype=bool)
    for box in boxes:
        assert inside(added, box).mean() > 2 * added.mean()
        inside(covered, box)[:] = True
    assert added[covered].sum() > 0.5 * added.sum()


@pytest.mark.parametrize("kind", OPACITY_KINDS)
def test_an_opacity_replaces_no_more_air_than_a_chest_holds(kind):
    added = film(4, kind).attenuation - film(4).attenuation
    # The thickest body is 29 cm deep, and a lung takes less than its whole depth.
    assert added.max() < (MU_SOFT - MU_LUNG) * 29


@pytest.mark.parametrize("view", ["PA", "AP"])
def test_lung_is_darker_than_heart_and_abdomen_on_both_sides(view):
    drawn = film(5, view=view).pixels.astype(float) / WHITE
    middle, fifth = SIZE // 2, SIZE // 5
    rows = slice(int(0.42 * SIZE), int(0.55 * SIZE))
    spine = drawn[rows, middle - 3 : middle + 3].mean()
    for columns in (slice(fifth, 2 * fifth), slice(-2 * fifth, -fifth)):
        lung = drawn[rows, columns].mean()
        assert lung < spine - 0.3
        assert lung < drawn[int(0.93 * SIZE) :, columns].mean() - 0.2


def test_an_ap_film_shows_the_same_heart_wider():
    """Same bodies, same seeds: only the view differs."""

    def heart_share(view: View) -> float:
        bright = [film(seed, view=view) for seed in range(8)]
        row = int(0.66 * SIZE)
        # cm of soft tissue across the cardiac region, from the true line integrals
        widths = [
            (f.attenuation[row] > 0.75 * f.attenuation[row].max()).sum() * f.pixel_spacing_mm
            for f in bright
        ]
        return float(np.mean(widths))

    assert heart_share("AP") > heart_share("PA")


def test_films_use_the_twelve_bits_without_much_black_or_white():
    for seed in range(4):
        pixels = film(seed).pixels
        assert pixels.dtype == np.uint16
        assert pixels.max() <= WHITE
        assert pixels.std() > 0.1 * WHITE
        central = pixels[SIZE // 4 : -SIZE // 4, SIZE // 4 : -SIZE // 4]
        assert np.isin(central, (0, WHITE)).mean() < 0.25


def test_a_film_too_small_to_show_anything_is_refused():
    body = draw_body(np.random.default_rng(1), "F", 30)
    with pytest.raises(ValueError, match="image_size"):
        draw_film(np.random.default_rng(1), body, "PA", None, 32)


# ------------------------------------------------------------------------------------- the labels


def test_view_split_format_and_place_do_not_depend_on_the_label():
    plan = list(phantom._plan(PhantomSettings(images=4000)))
    overall = np.mean([planned.kind is not None for planned in plan])
    assert overall == pytest.approx(0.45, abs=0.04)
    for fact in ("view", "split", "image_format", "in_shard"):
        groups = defaultdict(list)
        for planned in plan:
            groups[getattr(planned, fact)].append(planned.kind is not None)
        assert len(groups) > 1
        for value, opaque in groups.items():
            # Four standard errors of a share.
            error = 4 * np.sqrt(0.25 / len(opaque))
            assert np.mean(opaque) == pytest.approx(overall, abs=error), (fact, value)


def test_no_patient_is_in_two_splits_and_the_splits_are_60_20_20():
    plan = list(phantom._plan(PhantomSettings(images=2000)))
    splits = defaultdict(set)
    films = Counter(planned.patient for planned in plan)
    for planned in plan:
        splits[planned.patient].add(planned.split)
    assert all(len(found) == 1 for found in splits.values())
    assert set(films.values()) == {1, 2, 3}
    share = Counter(planned.split for planned in plan)
    for split, expected in (("train", 0.6), ("validation", 0.2), ("test", 0.2)):
        assert share[split] / len(plan) == pytest.approx(expected, abs=0.05)


def test_some_patients_have_films_of_both_labels():
    labels = defaultdict(set)
    for planned in phantom._plan(PhantomSettings(images=200)):
        labels[planned.patient].add(planned.kind is not None)
    assert any(len(found) == 2 for found in labels.values())


def test_every_image_has_one_label_row_and_no_name_gives_it_away(files):
    rows = rows_of(files["labels.csv"])
    assert list(rows[0]) == [
        "image",
        "label",
        "split",
        "patient_id",
        "view_position",
        "patient_sex",
        "patient_age_years",
    ]
    names = [row["image"] for row in rows]
    assert sorted(names) == sorted(images_of(files))
    assert len(set(names)) == SETTINGS.images
    assert {row["label"] for row in rows} == {"Normal", "Lung_Opacity"}
    assert not any("opacity" in name.lower() or "normal" in name.lower() for name in names)
    assert {Path(name).suffix for name in names} == {".png", ".jpg", ".dcm"}
    assert {row["view_position"] for row in rows} == {"PA", "AP"}
    assert {row["patient_sex"] for row in rows} == {"M", "F"}
    assert all(18 <= int(row["patient_age_years"]) <= 89 for row in rows)


def test_boxes_are_within_films_and_only_on_opacities(files):
    label_of = {row["image"]: row["label"] for row in rows_of(files["labels.csv"])}
    boxed = set()
    for row in rows_of(files["boxes.csv"]):
        x, y, width, height = (int(row[name]) for name in ("x", "y", "width", "height"))
        assert min(x, y) >= 0
        assert min(width, height) >= 1
        assert x + width <= SIZE
        assert y + height <= SIZE
        boxed.add(row["image"])
    assert boxed == {name for name, label in label_of.items() if label == "Lung_Opacity"}


# --------------------------------------------------------------------------------------- the files


def test_the_same_settings_give_the_same_bytes_and_another_seed_does_not(files, tmp_path):
    few = PhantomSettings(images=8, image_size=64, images_per_shard=3)
    for name, settings in (("a", few), ("b", few), ("c", PhantomSettings(8, 64, seed=8))):
        write_phantom_archive(LocalStore(tmp_path / name), settings)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert files_of(tmp_path / "a") != files_of(tmp_path / "c")


def test_every_file_decodes_and_says_that_it_is_synthetic(files):
    for name, data in images_of(files).items():
        decoded = one_film(data)
        assert decoded.pixels.shape == (SIZE, SIZE), name
        assert decoded.synthetic, name


def test_dicoms_carry_the_facts_of_the_labels(files):
    rows = {row["image"]: row for row in rows_of(files["labels.csv"])}
    images = images_of(files)
    uids = []
    for name in images:
        if not name.endswith(".dcm"):
            continue
        dataset = pydicom.dcmread(io.BytesIO(images[name]))
        assert dataset.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
        assert dataset.PatientName == "SYNTHETIC^PHANTOM"
        assert dataset.BodyPartExamined == "CHEST"
        assert dataset.ViewPosition == rows[name]["view_position"]
        assert dataset.PatientSex == rows[name]["patient_sex"]
        assert dataset.PatientAge == f"{int(rows[name]['patient_age_years']):03d}Y"
        assert dataset.PatientID == rows[name]["patient_id"]
        assert pydicom.uid.UID(dataset.SOPInstanceUID).is_valid
        uids.append(str(dataset.SOPInstanceUID))
    assert uids
    assert len(set(uids)) == len(uids)


def test_monochrome1_is_stored_inverted_and_reads_the_same():
    drawn = film(6, "consolidation")
    planned = next(phantom._plan(SETTINGS))
    row = {"patient_id": "phantom-00000", "patient_sex": "F", "patient_age_years": 40}
    plain, inverted = (phantom._dicom(drawn, planned, row, 3, m1) for m1 in (False, True))
    stored = [pydicom.dcmread(io.BytesIO(data)) for data in (plain, inverted)]
    assert [dataset.PhotometricInterpretation for dataset in stored] == [
        "MONOCHROME2",
        "MONOCHROME1",
    ]
    np.testing.assert_array_equal(stored[0].pixel_array, drawn.pixels)
    np.testing.assert_array_equal(WHITE - stored[1].pixel_array, drawn.pixels)
    read = [one_film(data).pixels.astype(int) for data in (plain, inverted)]
    # Rounding to 8 bits falls on the other side of a half.
    assert np.abs(read[0] - read[1]).max() <= 1


def test_both_polarities_occur(files):
    found = Counter(
        str(pydicom.dcmread(io.BytesIO(data)).PhotometricInterpretation)
        for name, data in images_of(files).items()
        if name.endswith(".dcm")
    )
    assert set(found) == {"MONOCHROME1", "MONOCHROME2"}


def test_shards_hold_as_many_members_as_asked_and_only_the_last_fewer(files):
    sizes = []
    for key in sorted(key for key in files if key.startswith("archive/shards/")):
        with tarfile.open(fileobj=io.BytesIO(files[key])) as tar:
            sizes.append(len(tar.getnames()))
    assert len(sizes) > 1
    assert set(sizes[:-1]) == {7}
    assert 1 <= sizes[-1] <= 7


def test_the_progress_adds_up(tmp_path):
    seen: list[int] = []
    settings = PhantomSettings(images=6, image_size=64, images_per_shard=2)
    write_phantom_archive(LocalStore(tmp_path), settings, seen.append)
    assert sum(seen) == len(images_of(files_of(tmp_path))) == 6


@pytest.mark.parametrize(
    "wrong",
    [
        {"images": 0},
        {"image_size": 63},
        {"images_per_shard": 0},
        {"opacity_fraction": 1.1},
        {"shard_fraction": -0.1},
    ],
)
def test_a_wrong_setting_is_refused_by_name(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{name} must be .*, not {value}$"):
        PhantomSettings(**wrong)


@pytest.mark.parametrize(("fraction", "labels"), [(0.0, {"Normal"}), (1.0, {"Lung_Opacity"})])
def test_an_archive_may_be_of_one_label(tmp_path, fraction, labels):
    settings = PhantomSettings(images=3, image_size=64, opacity_fraction=fraction)
    write_phantom_archive(LocalStore(tmp_path), settings)
    rows = rows_of((tmp_path / "labels.csv").read_bytes())
    assert {row["label"] for row in rows} == labels
