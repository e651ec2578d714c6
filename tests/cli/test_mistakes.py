"""One line for each mistake that a user can make, with its mend."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pandas as pd
import pytest

from tests.cli.running import run
from tests.results.records import commit_run_without_rows

MISTAKES = {
    "missing bucket": (
        ["screen", "--archive", "s3://nowhere/x", "--model", "{place}/model", "--output", "{out}"],
        "there is no bucket 'nowhere'",
    ),
    "empty prefix": (
        ["screen", "--archive", "{place}/none", "--model", "{place}/model", "--output", "{out}"],
        "nothing lies there",
    ),
    "unknown scheme": (
        ["screen", "--archive", "ftp://x/y", "--model", "{place}/model", "--output", "{out}"],
        "storage of kind 'ftp' is not supported",
    ),
    "no model": (
        ["screen", "--archive", "{place}/archive", "--model", "{place}/no", "--output", "{out}"],
        "is not a model folder",
    ),
    "bad run id": (
        ["screen", "--archive", "{place}/archive", "--model", "{place}/model", "--output", "{out}",
         "--run-id", "a/b"],
        "run id 'a/b'",
    ),
    "bad batch size": (
        ["screen", "--archive", "{place}/archive", "--model", "{place}/model", "--output", "{out}",
         "--batch-size", "0"],
        "--batch-size must be at least 1",
    ),
    "bad limit": (
        ["screen", "--archive", "{place}/archive", "--model", "{place}/model", "--output", "{out}",
         "--limit", "0"],
        "--limit must be at least 1",
    ),
    "unknown acceptance": (
        ["screen", "--archive", "{place}/archive", "--model", "{place}/model", "--output", "{out}",
         "--accept", "everything"],
        "--accept: 'everything' is none of for_processing, lateral_view, wrong_body_part, "
        "wrong_modality",
    ),
    "unknown quality flag": (
        ["evaluate", "--model", "{place}/model", "--images", "{place}/archive", "--labels",
         "{place}/labels.csv", "--output", "{out}", "--reject-quality", "ugly"],
        "--reject-quality: 'ugly' is none of blank, child, colour",
    ),
    "impossible fraction": (
        ["screen", "--archive", "{place}/archive", "--model", "{place}/model", "--output", "{out}",
         "--max-failed-fraction", "5"],
        "--max-failed-fraction must be from 0 to 1, not 5",
    ),
    "hashing without a key": (
        ["screen", "--archive", "{place}/archive", "--model", "{place}/model", "--output", "{out}",
         "--hash-keys"],
        "--hash-keys needs --hmac-key FILE",
    ),
    "a map without hashing": (
        ["screen", "--archive", "{place}/archive", "--model", "{place}/model", "--output", "{out}",
         "--key-map", "{place}/map"],
        "--key-map needs --hash-keys",
    ),
    "no key": (
        ["screen", "--archive", "{place}/archive", "--model", "{place}/model", "--output", "{out}",
         "--hmac-key", "{place}/none"],
        "the key cannot be read",
    ),
    "no run to retry": (
        ["retry", "--results", "{place}/results", "--run-id", "x"],
        "there is no published run 'x'",
    ),
    "unknown network": (
        ["train", "--images", "{place}/archive", "--labels", "{place}/labels.csv",
         "--output", "{out}", "--model", "lenet"],
        "unknown model 'lenet'; known: classical-cnn",
    ),
    "class without image": (
        ["train", "--images", "{place}/archive", "--labels", "{place}/labels.csv",
         "--output", "{out}", "--classes", "Normal,COVID"],
        "no image of class 'COVID'",
    ),
    "one class": (
        ["train", "--images", "{place}/archive", "--labels", "{place}/labels.csv",
         "--output", "{out}", "--classes", "Normal"],
        "give two or more different names",
    ),
    "no class at all": (
        ["train", "--images", "{place}/archive", "--labels", "{place}/labels.csv",
         "--output", "{out}", "--classes", ",,"],
        "Invalid value for '--classes': ',,' names no class",
    ),
    "no flag at all": (
        ["audit", "--images", "{place}/archive", "--labels", "{place}/labels.csv",
         "--reject-quality", " ,"],
        "Invalid value for '--reject-quality': ' ,' holds no word; say none",
    ),
    "output holds a model": (
        ["train", "--images", "{place}/archive", "--labels", "{place}/labels.csv",
         "--output", "{place}/model"],
        "holds a finished model",
    ),
    "no epochs": (
        ["train", "--images", "{place}/archive", "--labels", "{place}/labels.csv",
         "--output", "{out}", "--epochs", "0"],
        "--epochs must be 1 or more",
    ),
    "too many workers": (
        # Nor are there films: what cannot be is said before they are read.
        ["train", "--images", "{place}/none", "--labels", "{place}/labels.csv",
         "--output", "{out}", "--workers", "64", "--batch-size", "128"],
        "the Ray cluster has",
    ),
    "no GPU to train on": (
        ["train", "--images", "{place}/archive", "--labels", "{place}/labels.csv",
         "--output", "{out}", "--use-gpu"],
        "needs 1 GPU, the Ray cluster has 0",
    ),
    "no positive class": (
        ["train", "--images", "{place}/none", "--labels", "{place}/labels.csv",
         "--output", "{out}", "--positive-class", "Fracture"],
        "positive class 'Fracture' is not one of the classes",
    ),
    "no positive class for trials": (
        ["tune", "--images", "{place}/none", "--labels", "{place}/labels.csv",
         "--output", "{out}", "--set", "positive_class=Fracture"],
        "positive class 'Fracture' is not one of the classes",
    ),
    "no first weights": (
        ["train", "--images", "{place}/none", "--labels", "{place}/labels.csv",
         "--output", "{out}", "--weights", "{place}/none.pth"],
        "none.pth: cannot be read (no such file)",
    ),
    "no GPU to screen on": (
        ["screen", "--archive", "{place}/archive", "--model", "{place}/model", "--output", "{out}",
         "--use-gpu"],
        "screening needs 1 GPU, the Ray cluster has 0; use --no-gpu",
    ),
    "no GPU to evaluate on": (
        ["evaluate", "--model", "{place}/model", "--images", "{place}/archive",
         "--labels", "{place}/labels.csv", "--output", "{out}", "--use-gpu"],
        "evaluation needs 1 GPU, the Ray cluster has 0",
    ),
    "no place to write": (
        ["screen", "--archive", "{place}/archive", "--model", "{place}/model",
         "--output", "{place}/labels.csv/x"],
        "labels.csv",
    ),
    "no place for a model": (
        ["train", "--images", "{place}/archive", "--labels", "{place}/labels.csv",
         "--output", "{place}/labels.csv/x"],
        "labels.csv/x/.probe-",
    ),
    "no place for trials": (
        ["tune", "--images", "{place}/archive", "--labels", "{place}/labels.csv",
         "--output", "{place}/labels.csv/x"],
        "labels.csv/x/.probe-",
    ),
    "no place for a report": (
        ["evaluate", "--model", "{place}/model", "--images", "{place}/archive",
         "--labels", "{place}/labels.csv", "--output", "{place}/labels.csv/x"],
        "labels.csv/x/.probe-",
    ),
    "no place for an audit": (
        ["audit", "--images", "{place}/archive", "--labels", "{place}/labels.csv",
         "--output", "{place}/labels.csv/x"],
        "labels.csv/x/.probe-",
    ),
    "batch that workers cannot share": (
        ["train", "--images", "{place}/archive", "--labels", "{place}/labels.csv",
         "--output", "{out}", "--workers", "2", "--batch-size", "7"],
        "--batch-size",
    ),
    "absent labels": (
        ["train", "--images", "{place}/archive", "--labels", "{place}/none.csv",
         "--output", "{out}"],
        "labels cannot be read",
    ),
    "empty split": (
        ["evaluate", "--model", "{place}/model", "--images", "{place}/archive",
         "--labels", "{place}/only-train.csv", "--output", "{out}"],
        "no images in split 'test'",
    ),
    "no such column": (
        ["evaluate", "--model", "{place}/model", "--images", "{place}/archive",
         "--labels", "{place}/labels.csv", "--output", "{out}", "--by", "scanner"],
        "labels.csv: has no column 'scanner' (it has: image, label, split, view_position)",
    ),
    "subgroups of patients": (
        ["evaluate", "--model", "{place}/model", "--images", "{place}/archive",
         "--labels", "{place}/labels.csv", "--output", "{out}", "--by", "patient_id"],
        "--by patient_id: cannot form subgroups",
    ),
    "labels name absent files": (
        ["evaluate", "--model", "{place}/model", "--images", "{place}/archive",
         "--labels", "{place}/absent.csv", "--output", "{out}"],
        "1 of 3 labelled images are not in",
    ),
    "split without labels": (
        ["explain", "--model", "{place}/model", "--images", "{place}/archive", "--output", "{out}",
         "--split", "test"],
        "--split test: needs --labels FILE",
    ),
    "no run": (["query", "--results", "{out}", "SELECT 1"], "no published run there"),
    "unknown command": (["screem"], "No such command 'screem'"),
    "missing option": (["screen", "--archive", "x"], "Missing option '--model'"),
}  # fmt: skip


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_the_mend_and_exit_code_2(place, capfd, mistake):
    import ray

    if "GPU" in mistake and ray.cluster_resources().get("GPU", 0):
        pytest.skip("this machine has one")
    labels = pd.read_csv(place / "labels.csv")
    labels.assign(split="train").to_csv(place / "only-train.csv", index=False)
    absent = labels[labels["split"] == "test"].to_dict("records")
    gone = {"image": "gone.png", "label": "Normal", "split": "test"}
    pd.DataFrame([*absent, gone]).to_csv(place / "absent.csv", index=False)
    arguments, message = MISTAKES[mistake]
    filled = [text.format(place=place, out=place / "out") for text in arguments]
    code, out, err = run(capfd, *filled)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.lower().startswith("error: ")]
    assert message in line
    assert not (place / "out").exists()


def test_a_wrong_secret_is_one_line(place, s3_server, monkeypatch, capfd):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    code, _, err = run(
        capfd, "screen", "--archive", "s3://tests/x", "--model", place / "model",
        "--output", place / "out",
    )  # fmt: skip
    assert code == 2
    assert "does not accept these credentials" in err.splitlines()[-1]


def test_a_model_with_one_changed_byte_is_one_line(place, capfd):
    path = place / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, _, err = run(
        capfd, "screen", "--archive", place / "archive", "--model", place / "model",
        "--output", place / "out",
    )  # fmt: skip
    assert code == 2
    assert "model.safetensors was altered after training" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT nothing FROM predictions", "nothing"),
        ("SELEC 1", "SELEC"),
        ("CREATE TABLE x (a INT)", "begin with SELECT"),
        ("SELECT * FROM read_text('/etc/hostname')", "disabled"),
    ],
)
def test_sql_that_is_refused_is_one_line(tmp_path, capfd, sql, message):
    commit_run_without_rows(str(tmp_path), "one")
    code, out, err = run(capfd, "query", "--results", tmp_path, sql)
    assert (code, out) == (2, "")
    assert err.startswith("error: SQL: ")
    assert message in err


FORGED = "x\nerror: forged\r\x1b[2K\u202e"


def test_no_name_of_an_archive_makes_lines_or_moves_the_cursor(tmp_path, capfd):
    folder = tmp_path / FORGED
    folder.mkdir()
    (folder / "Normal.metadata.xlsx").write_bytes(b"no sheet")
    options = ["labels", "--folders", folder, "--output", tmp_path / "labels.csv"]
    code, _, err = run(capfd, *options)
    assert code == 2
    warning, error = err.splitlines()
    shown = r"/x\nerror: forged\r\x1b[2K\u202e"
    assert f"{shown}/Normal.metadata.xlsx: gives no sites" in warning
    assert error.endswith(
        f"{shown}: has no images; give a folder with a folder of images per class"
    )
    code, _, err = run(capfd, "--log-format", "json", *options)
    warning, error = (json.loads(line)["message"] for line in err.splitlines())
    assert FORGED in warning
    assert FORGED in error


def test_streams_that_the_caller_has_closed_change_no_exit_code(tmp_path):
    script = (
        "import sys; from lungopacity.cli import main; code = main(sys.argv[1:])\n"
        "print(code, open(sys.argv[3]).fileno() > 2, file=open(sys.argv[3] + '.told', 'w'))"
    )
    (tmp_path / "empty").touch()
    command = [sys.executable, "-c", script, "labels", "--folders", tmp_path / "empty"]
    subprocess.run(["sh", "-c", '"$0" "$@" <&- >&- 2>&-', *command], check=True)
    # Not 1, which means that the job is done.
    assert (tmp_path / "empty.told").read_text() == "2 True\n"


def test_a_user_without_a_home_has_one_for_ray(monkeypatch, capfd):
    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert run(capfd, "labels", "--help")[0] == 0
    assert os.environ["HOME"] == "/"
