"""What a user meets on the command line: help at once, one line a mistake, exit codes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from lungopacity.cli import main
from lungopacity.errors import NOTICE
from lungopacity.models.folder import save_model, training_films_parquet
from lungopacity.results.schema import evaluation_schema
from lungopacity.storage import open_store
from tests.films import dicom, encoded, grey_film, tar
from tests.models.tiny import tiny_model, write_tiny_model

COMMAND = Path(sysconfig.get_path("scripts")) / "lungopacity"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An archive of eight labelled films, a model, and labels."""
    store = open_store(str(tmp_path / "archive"))
    films = {f"{number}.png": encoded(grey_film(number)) for number in range(8)}
    for name in list(films)[:4]:
        store.write(name, films[name])
    store.write("x.tar", tar({name: films[name] for name in list(films)[4:]}))
    write_tiny_model(str(tmp_path / "model"))
    labels = pd.DataFrame(
        {
            "image": list(films),
            "label": ["Normal", "Lung_Opacity"] * 4,
            "split": ["train"] * 4 + ["validation"] * 2 + ["test"] * 2,
            "view_position": ["PA", "PA", "AP", "AP"] * 2,
        }
    )
    labels.to_csv(tmp_path / "labels.csv", index=False)
    return tmp_path


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return code, out, err


def test_help_answers_at_once_and_says_what_it_is():
    durations = []
    for _ in range(3):
        began = time.monotonic()
        done = subprocess.run([COMMAND, "--help"], capture_output=True, text=True, timeout=30)
        durations.append(time.monotonic() - began)
    assert done.returncode == 0
    assert "Research use only" in done.stdout
    assert min(durations) < 0.5


def test_help_of_every_command_imports_neither_ray_nor_torch():
    script = (
        "import sys; from lungopacity.cli import main\n"
        "for name in ('train', 'evaluate', 'explain', 'screen', 'retry', 'query', 'runs', "
        "'doctor'):\n"
        "    assert main([name, '--help']) == 0\n"
        "print(sorted({'ray', 'torch', 'pandas', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.usefixtures("ray_cluster")
def test_screen_query_and_runs_work_together(place, capfd):
    code, out, _ = run(
        capfd, "screen", "--archive", place / "archive", "--model", place / "model",
        "--output", place / "results", "--labels", place / "labels.csv", "--run-id", "night",
    )  # fmt: skip
    assert code == 0
    assert "8 scored, 0 rejected, 0 could not be read" in out
    assert NOTICE in out
    results = place / "results"
    code, out, _ = run(
        capfd, "query", "--results", results, "--format", "json",
        "SELECT count(*) n, count(label) labelled, min(screened_on) d FROM predictions",
    )  # fmt: skip
    row = json.loads(out)
    assert (code, row["n"], row["labelled"]) == (0, 8, 8)
    code, out, _ = run(
        capfd, "query", "--results", results, "--format", "csv",
        "SELECT \"group\", n FROM metrics WHERE metric = 'accuracy' ORDER BY 1",
    )  # fmt: skip
    assert out.splitlines()[1:4] == [
        '"age=unknown",8',
        '"all",8',
        '"patient_sex=unknown",8',
    ]
    assert '"view_position=AP",4' in out
    code, out, _ = run(capfd, "query", "--results", results, "SELECT run_id, images FROM runs")
    assert out.splitlines() == ["run_id  images", "------  ------", "night        8"]
    code, out, _ = run(capfd, "runs", "--results", results)
    assert code == 0
    assert "night" in out
    data = subprocess.run(
        [
            COMMAND,
            "query",
            "--results",
            results,
            "--format",
            "parquet",
            "SELECT * FROM predictions",
        ],
        capture_output=True,
        timeout=60,
        check=True,
    ).stdout
    (place / "answer.parquet").write_bytes(data)
    assert pq.read_table(place / "answer.parquet").num_rows == 8


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("fraction", "expected"), [("0.2", 1), ("0.05", 2), ("0", 2)])
def test_unreadable_images_make_the_exit_code_and_nothing_else_is_lost(
    place, capfd, fraction, expected
):
    (place / "archive" / "zero.png").write_bytes(b"")
    code, out, _ = run(
        capfd, "screen", "--archive", place / "archive", "--model", place / "model",
        "--output", place / "results", "--max-failed-fraction", fraction,
    )  # fmt: skip
    assert code == expected
    assert "8 scored, 0 rejected, 1 could not be read" in out
    assert "empty: 1" in out
    assert ("BROKEN" in out) == (expected == 2)
    code, out, _ = run(capfd, "query", "--results", place / "results", "SELECT count(*) FROM runs")
    assert code == 0, "a broken night is published all the same"


@pytest.mark.usefixtures("ray_cluster")
def test_rejections_are_the_users_to_choose(place, capfd):
    store = open_store(str(place / "archive"))
    film = grey_film().astype("uint16") * 16
    store.write("lateral.dcm", dicom(film, ViewPosition="LL"))
    store.write("hand.dcm", dicom(film, BodyPartExamined="HAND"))
    store.write("negative.png", encoded(255 - grey_film(2, 300, 300)))
    screening = (
        "screen", "--archive", place / "archive", "--model", place / "model",
        "--output", place / "results",
    )  # fmt: skip
    code, out, _ = run(capfd, *screening)
    assert code == 0
    assert "8 scored, 3 rejected, 0 could not be read" in out
    _, out, _ = run(capfd, *screening, "--accept", "lateral_view", "--reject-quality", "none")
    assert "10 scored, 1 rejected" in out
    _, out, _ = run(capfd, *screening, "--reject-quality", "low_contrast,inverted")
    assert "8 scored, 3 rejected" in out


@pytest.mark.usefixtures("ray_cluster")
def test_evaluate_writes_its_report(place, capfd):
    save_model(str(place / "model"), tiny_model())  # without a history, as of an ensemble
    open_store(str(place / "report")).write("history.png", b"of another model")
    code, out, _ = run(
        capfd, "evaluate", "--model", place / "model", "--images", place / "archive",
        "--labels", place / "labels.csv", "--output", place / "report", "--json",
    )  # fmt: skip
    assert code == 0
    report = json.loads(out)
    assert (report["images"], report["split"], report["notice"]) == (2, "test", NOTICE)
    written = {path.name for path in (place / "report").iterdir()}
    assert written >= {"metrics.parquet", "predictions.parquet", "confusion_matrix.png", "roc.png"}
    # Nor anything of a report that was there.
    assert not [name for name in written if name.startswith((".", "history"))]
    scores = pq.read_schema(place / "report" / "predictions.parquet")
    assert scores.equals(evaluation_schema(["Normal", "Lung_Opacity"]), check_metadata=True)


@pytest.mark.usefixtures("ray_cluster")
def test_evaluate_tests_on_no_film_that_the_model_knows(place, capfd):
    learnt = hashlib.sha256(encoded(grey_film(7))).hexdigest()
    write_tiny_model(str(place / "learnt"), training_films=training_films_parquet([learnt]))
    options = ["--model", place / "learnt", "--images", place / "archive"]
    options += ["--labels", place / "labels.csv"]
    code, _, err = run(capfd, "evaluate", *options, "--output", place / "report")
    assert code == 2
    assert "1 of 2 films of the test split are films that the model learnt from" in err
    assert "as 7.png; give the labels that it was trained with" in err
    assert not list((place / "report").iterdir())
    code, _, err = run(capfd, "evaluate", *options, "--output", place / "all", "--split", "all")
    assert code == 0
    assert "the model learnt from or was chosen by 1 of 8 films" in err
    code, _, err = run(capfd, "explain", *options, "--output", place / "pictures")
    assert code == 0
    assert "the model learnt from or was chosen by 1 of 2 films" in err


@pytest.mark.usefixtures("ray_cluster")
def test_evaluate_forms_subgroups_of_what_is_asked_for_and_tells_nothing_else(place, capfd):
    labels = pd.read_csv(place / "labels.csv").assign(
        patient_id=[f"ZZPLANTED{number // 2}" for number in range(8)],
        site=["North"] * 6 + ["South"] * 2,
        manufacturer=["Fuji", "GE"] * 4,
        note="ZZNOTE",
        status="ZZSTATUS",
    )
    labels.to_csv(place / "wide.csv", index=False)
    code, out, _ = run(
        capfd, "evaluate", "--model", place / "model", "--images", place / "archive", "--labels",
        place / "wide.csv", "--output", place / "wide", "--split", "all", "--by", "manufacturer",
    )  # fmt: skip
    assert code == 0
    assert "percentile bootstrap over 4 patients of 8 films" in out
    assert "too few films to compare" in out
    metrics = pq.read_table(place / "wide" / "metrics.parquet").to_pandas()
    assert set(metrics["group"]) >= {
        "all", "site=North", "site=South", "manufacturer=Fuji", "manufacturer=GE",
        "view_position=PA",
    }  # fmt: skip
    assert set(metrics["ci_method"].dropna()) <= {"bootstrap", "wilson_patients"}
    accuracy = metrics[metrics["metric"] == "accuracy"].set_index("group")
    assert accuracy.loc["site=North", ["n", "patients"]].tolist() == [6, 3]
    assert json.loads((place / "wide" / "evaluation.json").read_text())["patients"] == 4
    scores = pq.read_table(place / "wide" / "predictions.parquet").to_pandas()
    assert scores["patient_cluster"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    told = [out, repr(metrics.to_dict()), repr(scores.to_dict())]
    told += [path.read_bytes().decode("latin1") for path in (place / "wide").iterdir()]
    assert not any(secret in text for text in told for secret in ("ZZPLANTED", "ZZNOTE", "ZZST"))


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
        "no model folder there",
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
        "--accept: 'everything' is none of lateral_view, wrong_body_part, wrong_modality",
    ),
    "unknown quality flag": (
        ["evaluate", "--model", "{place}/model", "--images", "{place}/archive", "--labels",
         "{place}/labels.csv", "--output", "{out}", "--reject-quality", "ugly"],
        "--reject-quality: 'ugly' is none of blank, colour",
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
        "--key-map is for --hash-keys",
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
        "needs 1 GPUs, the Ray cluster has 0",
    ),
    "no positive class": (
        ["train", "--images", "{place}/none", "--labels", "{place}/labels.csv",
         "--output", "{out}", "--positive-class", "Fracture"],
        "positive class 'Fracture' is none of the labels",
    ),
    "no first weights": (
        ["train", "--images", "{place}/none", "--labels", "{place}/labels.csv",
         "--output", "{out}", "--weights", "{place}/none.pth"],
        "none.pth: cannot be read (no such file)",
    ),
    "no GPU to screen on": (
        ["screen", "--archive", "{place}/archive", "--model", "{place}/model", "--output", "{out}",
         "--use-gpu"],
        "screening needs 1 GPUs, the Ray cluster has 0; use --no-gpu",
    ),
    "no GPU to evaluate on": (
        ["evaluate", "--model", "{place}/model", "--images", "{place}/archive",
         "--labels", "{place}/labels.csv", "--output", "{out}", "--use-gpu"],
        "evaluation needs 1 GPUs",
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
        "no image in split 'test'",
    ),
    "no such column": (
        ["evaluate", "--model", "{place}/model", "--images", "{place}/archive",
         "--labels", "{place}/labels.csv", "--output", "{out}", "--by", "scanner"],
        "labels.csv: has no column 'scanner' (it has: image, label, split, view_position)",
    ),
    "subgroups of patients": (
        ["evaluate", "--model", "{place}/model", "--images", "{place}/archive",
         "--labels", "{place}/labels.csv", "--output", "{out}", "--by", "patient_id"],
        "--by patient_id: forms no subgroups",
    ),
    "labels name absent files": (
        ["evaluate", "--model", "{place}/model", "--images", "{place}/archive",
         "--labels", "{place}/absent.csv", "--output", "{out}"],
        "1 of 3 labelled images are not in",
    ),
    "no run": (["query", "--results", "{out}", "SELECT 1"], "no finished run lies there"),
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


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT nothing FROM predictions", "nothing"),
        ("SELEC 1", "SELEC"),
        ("CREATE TABLE x (a INT)", "begin with SELECT"),
        ("SELECT * FROM read_text('/etc/hostname')", "disabled"),
    ],
)
def test_sql_that_is_refused_is_one_line(place, capfd, sql, message):
    run(
        capfd, "screen", "--archive", place / "archive", "--model", place / "model",
        "--output", place / "results", "--limit", "1",
    )  # fmt: skip
    code, out, err = run(capfd, "query", "--results", place / "results", sql)
    assert (code, out) == (2, "")
    assert err.startswith("error: SQL: ")
    assert message in err


def test_doctor_finds_what_is_there_and_what_is_missing(s3_server, capfd):
    code, out, _ = run(capfd, "doctor", "--storage", "s3://tests")
    assert code == 0
    for what in ("torch", "ray", "dicom", "storage"):
        assert any(line.split()[:2] in (["ok", what], ["note", what]) for line in out.splitlines())
    code, out, _ = run(capfd, "doctor", "--storage", "/no/such/folder")
    assert "/no/such/folder: nothing lies there" in out
    code, out, _ = run(capfd, "doctor", "--storage", "s3://nowhere")
    assert code == 2
    assert "no bucket 'nowhere'" in out
    assert "→ create it" in out


def test_doctor_tells_an_address_for_jobs_from_one_of_a_cluster(monkeypatch, capfd):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    code, out, _ = run(capfd, "doctor")
    assert code == 2
    assert "RAY_ADDRESS is http://127.0.0.1:8265, where jobs are submitted" in out
    assert "→ unset it" in out


def test_python_functions_print_nothing(place, ray_cluster, capfd):
    import lungopacity

    result = lungopacity.screen(
        str(place / "archive"), str(place / "model"), str(place / "results")
    )
    assert lungopacity.runs(result.results).num_rows == 1
    assert capfd.readouterr().out == ""
    assert {"train", "screen", "evaluate", "query", "runs"} <= set(lungopacity.__all__)
    with pytest.raises(AttributeError):
        lungopacity.nothing  # noqa: B018


def test_a_job_is_the_command_under_another_name(place):
    for name in ("train", "evaluate", "screen"):
        done = subprocess.run(
            [sys.executable, f"jobs/{name}.py", "--help"],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": "."},
        )
        assert done.returncode == 0
        assert f"lungopacity {name}" in done.stdout
