"""What a user meets on the command line: help at once, one line a mistake, exit codes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import click
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from lungopacity.cli import cli, main
from lungopacity.errors import NOTICE
from lungopacity.models import OperatingPoint, save_model, save_operating_point
from lungopacity.models.folder import training_films_parquet
from lungopacity.results.schema import evaluation_schema
from lungopacity.storage import open_store
from tests.cli.running import run
from tests.films import dicom, encoded, grey_film, tar
from tests.models.tiny import tiny_model, with_distribution, write_tiny_model
from tests.parquet_pages import has_page_checksums
from tests.results.records import commit_run_without_rows

COMMAND = Path(sysconfig.get_path("scripts")) / "lungopacity"


def test_help_answers_at_once_and_says_what_it_is():
    cpu_s = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([COMMAND, "--help"], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # The wall's clock tells how busy the machine is, too.
        cpu_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.returncode == 0
    assert "Research use only" in done.stdout
    assert min(cpu_s) < 0.5


def test_every_option_says_what_it_is_for():
    commands = [*cli.commands.values(), *cli.commands["benchmark"].commands.values()]
    silent = [
        f"{command.name} {option.opts[0]}"
        for command in commands
        for option in command.params
        if isinstance(option, click.Option) and not option.help
    ]
    assert silent == []


def test_help_of_every_command_imports_neither_ray_nor_torch():
    script = (
        "import sys; from lungopacity.cli import main\n"
        "for name in ('train', 'evaluate', 'explain', 'screen', 'retry', 'query', 'runs', "
        "'doctor'):\n"
        "    assert main([name, '--help']) == 0\n"
        "print(sorted({'ray', 'torch', 'pandas', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
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
        check=True,
    ).stdout
    assert has_page_checksums(data)
    (place / "answer.parquet").write_bytes(data)
    assert pq.read_table(place / "answer.parquet").num_rows == 8


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("fraction", "expected"), [("0.2", 1), ("0", 2)])
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
    code, out, _ = run(
        capfd, "screen", "--archive", place / "archive", "--model", place / "model",
        "--output", place / "results",
        "--accept", "lateral_view", "--reject-quality", "low_contrast,too_small",
    )  # fmt: skip
    assert code == 0
    assert "10 scored, 1 rejected, 0 could not be read" in out
    assert "wrong_body_part: 1" in out


@pytest.mark.usefixtures("ray_cluster")
def test_evaluate_writes_its_report(place, capfd):
    # Without a history, as of an ensemble.
    films_NHW = np.stack([grey_film(number, 32, 32) for number in range(40)])
    model = with_distribution(tiny_model(), films_NHW)
    save_model(str(place / "model"), model)
    # Of the decisions only its own are for review.
    ours = OperatingPoint(1.0, review_from=0.0, chosen_by="cost=5 here")
    picked_on = [hashlib.sha256(encoded(grey_film(number))).hexdigest() for number in range(9)]
    save_operating_point(str(place / "model"), model, "ours", ours, picked_on)
    save_operating_point(str(place / "model"), model, "others", ours, ["0" * 64])
    open_store(str(place / "report")).write("history.png", b"of another model")
    code, out, err = run(
        capfd, "evaluate", "--model", place / "model", "--images", place / "archive",
        "--labels", place / "labels.csv", "--output", place / "report", "--json",
        "--operating-point", "ours",
    )  # fmt: skip
    assert code == 0
    assert "Scoring: 2 of 2 images" in err
    report = json.loads(out)
    assert (report["images"], report["split"], report["notice"]) == (2, "test", NOTICE)
    written = {path.name for path in (place / "report").iterdir()}
    assert written >= {"metrics.parquet", "predictions.parquet", "confusion_matrix.png", "roc.png"}
    # Nor anything of a report that was there.
    assert not [name for name in written if name.startswith((".", "history"))]
    tables = place.glob("report/*.parquet")
    assert all(has_page_checksums(path.read_bytes()) for path in tables)
    scores = pq.read_table(place / "report" / "predictions.parquet")
    schema = evaluation_schema(["Normal", "Lung_Opacity"])
    assert scores.schema.equals(schema, check_metadata=True)
    assert scores["decision"].to_pylist() == ["review"] * 2
    assert scores["ensemble_disagreement"].null_count == 2
    assert scores["out_of_distribution_score"].null_count == 0
    # What a site has picked is measured beside the model's own.
    points = {
        row["class_name"] for row in report["metrics"] if row["metric"].startswith("decision")
    }
    assert (points, report["operating_point"]) == ({"default", "ours", "others"}, "ours")
    lines = (place / "report" / "table1.txt").read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("at ours "))
    assert re.match(
        r"  review counted as found +sensitivity 1\.0.*, under review 1\.0", lines[at + 1]
    )
    card = (place / "report" / "model_card.md").read_text()
    assert (report["decided_at"], report["unknown_patients"]) == ("ours", 2)
    assert lines[1].endswith("; 2 films have no patient_id")
    # On these very films one was picked, and the other not.
    flatters = "picked on 2 of these films: its metrics look too good"
    assert report["picked_on"] == {"ours": 2}
    assert [number for number, line in enumerate(lines) if "too good" in line] == [at + 2]
    assert lines[at + 2].endswith(f"   {flatters}")
    assert f"- ours: positive from 1.0000, review from 0.0000; cost=5 here; {flatters}\n" in card
    assert card.count("too good") == 1


@pytest.mark.usefixtures("ray_cluster")
def test_evaluate_tests_on_no_film_that_the_model_knows(place, capfd):
    learnt = hashlib.sha256(encoded(grey_film(7))).hexdigest()
    films_NHW = np.stack([grey_film(number, 32, 32) for number in range(40)])
    save_model(
        str(place / "learnt"),
        with_distribution(tiny_model(), films_NHW),
        training_films_parquet=training_films_parquet([learnt]),
    )
    options = ["--model", place / "learnt", "--images", place / "archive"]
    options += ["--labels", place / "labels.csv"]
    code, _, err = run(capfd, "evaluate", *options, "--output", place / "report")
    assert code == 2
    assert "calibrated on 1 of 2 films of the test split" in err
    assert "such as 7.png; give the labels that it was trained with" in err
    assert not (place / "report").exists()
    # A class may be absent: its figures are not defined.
    labels = pd.read_csv(place / "labels.csv")
    labels.assign(label="Lung_Opacity").to_csv(place / "labels.csv", index=False)
    noise = np.random.default_rng(0).integers(0, 256, (128, 128)).astype(np.uint8)
    films = {f"{number}.png": encoded(grey_film(number)) for number in (4, 5, 7)}
    open_store(str(place / "archive")).write("x.tar", tar(films | {"6.png": encoded(noise)}))
    options += ["--reject-quality", "out_of_distribution"]
    code, out, err = run(capfd, "evaluate", *options, "--output", place / "all", "--split", "all")
    assert code == 0
    assert "on 7 images of split 'all', 1 rejected" in out
    assert "1 of 8 labelled images are left out (poor_quality (out_of_distribution): 1)" in err
    assert "the model was trained, selected or calibrated on 1 of 8 films" in err
    assert "no image of class 'Normal'" in err
    assert re.search(r"\nAUC Lung_Opacity +not defined\n", out)
    # Who reads the report later is told, too.
    known = "the model was trained, selected or calibrated on 1 of these films: its metrics look"
    assert out.splitlines()[1].startswith(known)
    assert f"\n**Note: {known} too good.**\n" in (place / "all" / "model_card.md").read_text()
    assert json.loads((place / "all" / "evaluation.json").read_text())["known_to_model"] == 1
    options += ["--output", place / "pictures"]
    code, _, err = run(capfd, "explain", *options, "--split", "all")
    assert "the model was trained, selected or calibrated on 1 of 8 films" in err
    code, out, err = run(capfd, "explain", *options, "--json")
    assert code == 0
    assert [json.loads(out)[name] for name in ("explained", "rejected")] == [1, 1]
    assert "the model was trained, selected or calibrated on 1 of 2 films" in err


@pytest.mark.usefixtures("ray_cluster")
def test_evaluate_forms_subgroups_of_what_is_asked_for_and_tells_nothing_else(place, capfd):
    labels = pd.read_csv(place / "labels.csv").assign(
        patient_id=[f"ZZPLANTED{number // 2}" for number in range(8)],
        site=["North"] * 6 + ["South"] * 2,
        manufacturer=["Fuji", "GE"] * 4,
        age=[50, 60] * 4,
        patient_age_years=[20.9, 93.5] * 4,
        note="ZZNOTE",
        status="ZZSTATUS",
    )
    labels.to_csv(place / "wide.csv", index=False)
    write_tiny_model(str(place / "of-normal"), positive_class="Normal")
    code, out, _ = run(
        capfd, "evaluate", "--model", place / "of-normal", "--images", place / "archive",
        "--labels", place / "wide.csv", "--output", place / "wide", "--split", "all",
        "--by", "manufacturer", "--by", "age",
    )  # fmt: skip
    assert code == 0
    assert "effective sample, of others percentile bootstrap over 4 patients of 8 films" in out
    assert "few patients, or of one class" in out
    metrics = pq.read_table(place / "wide" / "metrics.parquet").to_pandas()
    assert set(metrics["group"]) >= {
        "all", "site=North", "site=South", "manufacturer=Fuji", "manufacturer=GE",
        "view_position=PA", "age=18-39", "age=90+", "age of the labels=50",
    }  # fmt: skip
    assert set(metrics["ci_method"].dropna()) == {"bootstrap", "wilson_effective"}
    accuracy = metrics[metrics["metric"] == "accuracy"].set_index("group")
    assert accuracy.loc["site=North", ["n", "patients"]].tolist() == [6, 3]
    assert json.loads((place / "wide" / "evaluation.json").read_text())["patients"] == 4
    scores = pq.read_table(place / "wide" / "predictions.parquet").to_pandas()
    assert scores["patient_cluster"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    # Whole years; an age of 93 identifies.
    assert scores["patient_age_years"].tolist() == [20, 90] * 4
    expected = np.where(scores["p_Normal"] >= 0.5, "positive", "negative")
    assert scores["decision"].tolist() == expected.tolist()
    told = [out, repr(metrics.to_dict()), repr(scores.to_dict())]
    told += [path.read_bytes().decode("latin1") for path in (place / "wide").iterdir()]
    assert not any(secret in text for text in told for secret in ("ZZPLANTED", "ZZNOTE", "ZZST"))


def test_whatever_is_handed_out_says_what_it_is_not_for(place, capfdbinary):
    results = str(place / "results")
    commit_run_without_rows(results, "one")
    asked = ["query", "--results", results, "SELECT 1 AS one", "--format"]
    for arguments in (
        *([*asked, output_format] for output_format in ("table", "csv", "json")),
        ["runs", "--results", results],
        ["models", "classical-cnn"],
        ["labels", "--table", f"t={place / 'labels.csv'}", "--sql", "FROM t",
         "--output", str(place / "again.csv")],
        ["clean", "--results", results],
        ["retry", "--results", results, "--run-id", "one"],
    ):  # fmt: skip
        assert main(arguments) == 0
        out, err = capfdbinary.readouterr()
        last = (err if arguments[0] == "query" else out).decode().splitlines()[-1]
        assert last == NOTICE, arguments
    assert main([*asked, "parquet"]) == 0
    answer = pq.read_schema(pa.BufferReader(capfdbinary.readouterr().out))
    assert answer.metadata[b"notice"] == NOTICE.encode()


def test_doctor_finds_what_is_there_and_what_is_missing(s3_server, capfd):
    open_store("s3://tests/doctor").write("film.png", b"x")
    film = "s3://tests/doctor/film.png"
    code, out, _ = run(capfd, "doctor", "--storage", film, "--results", "s3://tests/x")
    assert code == 0
    assert f"{film} can be listed" in out
    assert "s3://tests/x can be written to" in out
    assert not list(open_store("s3://tests/x").list())
    for what in ("torch", "ray", "dicom"):
        assert any(line.split()[:2] in (["ok", what], ["note", what]) for line in out.splitlines())
    code, out, _ = run(capfd, "doctor", "--storage", "/no/such/folder")
    assert code == 2
    assert "/no/such/folder: nothing lies there" in out
    code, out, _ = run(capfd, "doctor", "--storage", "s3://nowhere")
    assert code == 2
    assert "no bucket 'nowhere'" in out
    assert "→ create it" in out


def test_doctor_tells_an_address_for_jobs_from_one_of_a_cluster(monkeypatch, capfd):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    code, out, _ = run(capfd, "doctor")
    assert code == 2
    assert "RAY_ADDRESS is http://127.0.0.1:8265, an address for submitting jobs" in out
    assert "→ unset it" in out


@pytest.mark.usefixtures("ray_cluster")
def test_doctor_tries_what_the_job_would_find_missing(tmp_path, monkeypatch, capfd):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr("lungopacity.doctor._NVIDIA", (str(tmp_path),))
    monkeypatch.setattr("lungopacity.doctor._LIBRARIES", ("nosuch",))
    monkeypatch.setenv("RAY_ADDRESS", closed)
    (tmp_path / "file").touch()
    code, out, _ = run(capfd, "doctor", "--results", tmp_path / "file" / "results")
    assert code == 2
    told = [line.split() for line in out.splitlines()]
    for what in ("libraries", "ray", "results"):
        assert ["missing", what] in [words[:2] for words in told]
    assert f"nothing answers at {closed} (" in out
    assert "there is an NVIDIA GPU: install driver 580 or newer" in out
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    _, out, _ = run(capfd, "doctor")
    assert f"joins {ray.get_runtime_context().gcs_address} (RAY_ADDRESS) of 2 CPUs" in out


def test_python_functions_print_nothing(place, ray_cluster, capfd):
    import lungopacity

    result = lungopacity.screen(
        str(place / "archive"), str(place / "model"), str(place / "results")
    )
    assert lungopacity.runs(result.results).num_rows == 1
    assert capfd.readouterr().out == ""
    assert {"train", "screen", "evaluate", "query", "runs", "clean"} <= set(lungopacity.__all__)
    assert all(hasattr(lungopacity, name) for name in lungopacity.__all__)
    with pytest.raises(AttributeError):
        lungopacity.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("job", "name"),
    [
        (["jobs/train.py"], "train"),
        (["jobs/screen.py"], "screen"),
        (["-m", "lungopacity", "retry"], "retry"),
    ],
)
def test_a_job_is_the_command_under_another_name(job, name):
    done = subprocess.run(
        [sys.executable, *job, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert done.returncode == 0
    assert f"lungopacity {name}" in done.stdout
