import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from lungopacity.errors import UserError
from lungopacity.models import OperatingPoint, is_model, load_model, read_history, save_model
from lungopacity.models.folder import (
    DISTRIBUTION_FILE,
    SPEC_FILE,
    SUMS_FILE,
    WEIGHTS_FILE,
    films_known_to,
    training_films_parquet,
)
from lungopacity.radiograph import Preprocessing
from lungopacity.storage import open_store
from tests.models.tiny import history_parquet, tiny_model, with_distribution, write_tiny_model

FILMS = np.random.default_rng(0).integers(0, 90, (40, 32, 32), dtype=np.uint8)


def write_sums(uri: str) -> None:
    """Writes the checksums of the folder's present files."""
    store = open_store(uri)
    names = (WEIGHTS_FILE, SPEC_FILE, "history.parquet")
    lines = [f"{hashlib.sha256(store.read(name)).hexdigest()}  {name}\n" for name in names]
    store.write(SUMS_FILE, "".join(lines).encode())


def test_a_model_comes_back_as_it_was_saved(store_uri):
    saved = write_tiny_model(store_uri, temperature=1.7, class_biases=(0.25, -0.25), synthetic=True)
    loaded = load_model(store_uri)
    assert loaded == saved
    assert loaded.model_id == saved.model_id
    assert read_history(store_uri) == history_parquet()
    x_B1HW = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded.network()(x_B1HW), saved.network()(x_B1HW))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"temperature": 2.0},
        {"class_biases": (0.0, 0.0)},
        {"preprocessing": Preprocessing(image_size=64)},
        {"preprocessing": Preprocessing(image_size=32, mean=0.4)},
        {"preprocessing": Preprocessing(image_size=32, crop_borders=True)},
        {"class_names": ("Lung_Opacity", "Normal")},
    ],
)
def test_the_id_follows_all_that_changes_a_score(change):
    assert tiny_model(**change).model_id != tiny_model().model_id


def test_a_distribution_comes_back_and_is_part_of_the_id(store_uri):
    model = with_distribution(tiny_model(), FILMS)
    save_model(store_uri, model, history_parquet())
    assert load_model(store_uri) == model
    other = with_distribution(tiny_model(), FILMS // 2)
    assert len({tiny_model().model_id, model.model_id, other.model_id}) == 3


def test_a_folder_of_format_1_is_read_and_keeps_its_id(tmp_path):
    """Older than the distribution and the setting crop_borders."""
    uri = str(tmp_path / "m")
    model = write_tiny_model(uri)
    store = open_store(uri)
    document = {**json.loads(store.read(SPEC_FILE)), "format_version": 1}
    del document["preprocessing"]["crop_borders"]
    store.write(SPEC_FILE, json.dumps(document).encode())
    write_sums(uri)
    assert load_model(uri).distribution is None
    spec = model.spec
    decided = {
        "architecture": spec.architecture,
        "architecture_settings": dict(spec.architecture_settings),
        "class_names": spec.class_names,
        "preprocessing": {"image_size": 32, "mean": 0.5, "std": 0.25},
        "temperature": spec.temperature,
        "weights_sha256": hashlib.sha256(model.weights).hexdigest(),
    }
    then = hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]
    assert load_model(uri).model_id == model.model_id == then


def test_the_id_ignores_what_changes_no_score():
    assert tiny_model(operating_point=OperatingPoint(0.9)).model_id == tiny_model().model_id


@pytest.mark.parametrize(
    "name", [WEIGHTS_FILE, SPEC_FILE, SUMS_FILE, "history.parquet", DISTRIBUTION_FILE]
)
@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_one_changed_byte_anywhere_is_refused(tmp_path, name, place):
    model = with_distribution(tiny_model(), FILMS)
    save_model(str(tmp_path / "m"), model, history_parquet())
    path = tmp_path / "m" / name
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"altered after training|is damaged"):
        load_model(str(tmp_path / "m"))


@pytest.mark.parametrize("name", [WEIGHTS_FILE, SPEC_FILE])
def test_sums_that_leave_a_file_unchecked_are_refused(tmp_path, name):
    """Without its line, or without its sum."""
    write_tiny_model(str(tmp_path / "m"))
    path = tmp_path / "m" / SUMS_FILE
    lines = path.read_text().splitlines(keepends=True)
    others = "".join(line for line in lines if not line.endswith(f"  {name}\n"))
    for text, said in ((others, "SHA256SUMS is damaged"), (f"{others}  {name}\n", "was altered")):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            load_model(str(tmp_path / "m"))


def test_sha256sum_agrees(tmp_path):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    write_tiny_model(str(tmp_path / "m"))
    subprocess.run(["sha256sum", "-c", SUMS_FILE], cwd=tmp_path / "m", check=True, timeout=20)


def test_an_absent_and_an_unfinished_folder_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="is not a model folder"):
        load_model(str(tmp_path / "none"))
    write_tiny_model(str(tmp_path / "m"))
    (tmp_path / "m" / SUMS_FILE).unlink()
    assert not is_model(str(tmp_path / "m"))
    with pytest.raises(UserError, match="unfinished"):
        load_model(str(tmp_path / "m"))


def test_a_missing_file_is_named(tmp_path):
    write_tiny_model(str(tmp_path / "m"))
    (tmp_path / "m" / WEIGHTS_FILE).unlink()
    with pytest.raises(UserError, match="cannot be read completely"):
        load_model(str(tmp_path / "m"))


def test_a_newer_format_is_refused_with_the_reason(tmp_path):
    write_tiny_model(str(tmp_path / "m"))
    store = open_store(str(tmp_path / "m"))
    document = {**json.loads(store.read(SPEC_FILE)), "format_version": 99}
    store.write(SPEC_FILE, json.dumps(document).encode())
    write_sums(str(tmp_path / "m"))
    with pytest.raises(UserError, match="format 99 is newer"):
        load_model(str(tmp_path / "m"))


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": None},
        {"format_version": "4"},
        {"temperature": 0},
        {"temperature": None},
        {"class_names": None},
        {"preprocessing": {"sides": 3}},
        {"operating_point": {"threshold": 3}},
        {"operating_points": []},
        ["class_names"],
        [],
    ],
)
def test_a_model_json_that_makes_no_model_is_damaged(tmp_path, change):
    write_tiny_model(str(tmp_path / "m"))
    store = open_store(str(tmp_path / "m"))
    document = json.loads(store.read(SPEC_FILE))
    if isinstance(change, dict):
        document |= change
    elif change:
        del document[change[0]]
    else:
        document = []
    store.write(SPEC_FILE, json.dumps(document).encode())
    write_sums(str(tmp_path / "m"))
    with pytest.raises(UserError, match=r"m: model\.json is damaged \(.*\); restore the folder"):
        load_model(str(tmp_path / "m"))
    store.write(SPEC_FILE, json.dumps(document).encode()[:-1])
    write_sums(str(tmp_path / "m"))
    with pytest.raises(UserError, match=r"model\.json is damaged"):
        load_model(str(tmp_path / "m"))


def test_a_model_json_of_another_model_is_refused(tmp_path):
    write_tiny_model(str(tmp_path / "m"))
    store = open_store(str(tmp_path / "m"))
    document = json.loads(store.read(SPEC_FILE)) | {"temperature": 1.5}
    store.write(SPEC_FILE, json.dumps(document).encode())
    write_sums(str(tmp_path / "m"))
    with pytest.raises(
        UserError, match=r"model\.json names model \w{16}, but its contents are model \w{16};"
    ):
        load_model(str(tmp_path / "m"))


def test_no_pickle_lies_in_the_folder(tmp_path):
    write_tiny_model(str(tmp_path / "m"))
    names = sorted(path.name for path in Path(tmp_path / "m").iterdir())
    assert names == [SUMS_FILE, "history.parquet", SPEC_FILE, WEIGHTS_FILE]
    assert (tmp_path / "m" / WEIGHTS_FILE).read_bytes()[8:9] == b"{"  # safetensors' JSON header


@pytest.mark.parametrize(
    ("probability", "decision"),
    [(0.1, "negative"), (0.3, "review"), (0.59, "review"), (0.6, "positive"), (1.0, "positive")],
)
def test_an_operating_point_with_a_review_band_decides(probability, decision):
    assert OperatingPoint(0.6, review_from=0.3).decide(probability) == decision


def test_a_probability_that_is_not_a_number_gives_no_decision():
    with pytest.raises(ValueError, match="not a number gives no decision"):
        OperatingPoint(0.6).decide(float("nan"))


@pytest.mark.parametrize("wrong", [{"threshold": 1.5}, {"threshold": 0.5, "review_from": 0.6}])
def test_an_impossible_operating_point_is_refused(wrong):
    with pytest.raises(ValueError, match="must be from 0"):
        OperatingPoint(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"class_names": ("Normal",)},
        {"class_names": ("Normal", "Normal")},
        {"positive_class": "COVID"},
        {"temperature": 0.0},
        {"class_biases": (0.1,)},
    ],
)
def test_a_senseless_spec_is_refused(wrong):
    with pytest.raises(ValueError, match=r"class_names|positive_class|temperature|class_biases"):
        tiny_model(**wrong)


def test_a_folder_that_does_not_tell_its_training_films_says_so(tmp_path, caplog):
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    model = tiny_model()
    save_model(old, model, history_parquet())
    save_model(
        new, model, history_parquet(), training_films_parquet=training_films_parquet(["a" * 64])
    )
    assert films_known_to(new) == {"a" * 64}
    assert caplog.text == ""
    assert films_known_to(old) == frozenset()
    assert f"{old} does not tell which films it learnt from" in caplog.text
