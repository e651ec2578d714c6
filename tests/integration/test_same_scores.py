"""One preprocessing: a film's scores are the same whether it is evaluated or screened."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import ray
import torch

import lungopacity
from lungopacity.archive.content import ReadSettings
from lungopacity.archive.inventory import take_inventory
from lungopacity.archive.stream import stream_images
from lungopacity.models import save_model
from lungopacity.models.compiled import CompiledNetwork, to_bytes
from lungopacity.models.scorer import Scorer
from lungopacity.radiograph import Preprocessing
from lungopacity.results.folder import read_run
from lungopacity.screening import pipeline
from lungopacity.storage import open_store
from tests.films import dicom, encoded, grey_film, tar, tiff_of_pages
from tests.models.tiny import history_parquet, tiny_model, write_tiny_model
from tests.real_data import LUNG_FIELDS, needs_real_data

SCORES = ["p_Normal", "p_Lung_Opacity", "logit_Normal", "logit_Lung_Opacity"]


def scores_of(folder: str, name_columns: tuple[str, ...]) -> pd.DataFrame:
    frame = pd.read_parquet(folder)
    name = frame[name_columns[0]]
    for column in name_columns[1:]:
        name = name.fillna(frame[column])
    return frame.assign(name=name).set_index("name")[SCORES].dropna().sort_index()


def assert_same_scores(archive: str, labels: pd.DataFrame, place, **options) -> int:
    labels.to_csv(place / "labels.csv", index=False)
    model = str(place / "model")
    lungopacity.evaluate(
        model, [archive], str(place / "labels.csv"), str(place / "report"), split="all"
    )
    lungopacity.screen(archive, model, str(place / "results"), **options)
    evaluated = scores_of(str(place / "report" / "predictions.parquet"), ("image",))
    screened = scores_of(str(place / "results" / "predictions"), ("member", "image"))
    both = evaluated.join(screened, rsuffix="_screened", how="inner")
    for column in SCORES:
        np.testing.assert_allclose(both[column], both[f"{column}_screened"], rtol=0, atol=1e-5)
    assert len(both) == len(evaluated)
    return len(both)


@pytest.mark.usefixtures("ray_cluster")
def test_every_format_loose_and_in_shards_scores_alike(s3_uri, tmp_path):
    store = open_store(s3_uri)
    films = {
        **{f"{n}.png": encoded(grey_film(n, 300, 200)) for n in range(40)},
        **{f"{n}.jpg": encoded(grey_film(n, 900, 700), "JPEG") for n in range(40)},
        **{f"{n}.dcm": dicom(grey_film(n).astype(np.uint16) * 16) for n in range(20)},
    }
    names = list(films)
    for name in names[::2]:
        store.write(name, films[name])
    store.write("x.tar", tar({name: films[name] for name in names[1::2]}))
    write_tiny_model(str(tmp_path / "model"), image_size=64, temperature=1.3)
    labels = pd.DataFrame({"image": names, "label": ["Normal", "Lung_Opacity"] * 50})
    assert assert_same_scores(s3_uri, labels, tmp_path, batch_size=7) == 100


@pytest.mark.usefixtures("ray_cluster")
def test_one_process_for_all_stages_or_one_for_each_gives_the_same_rows(tmp_path, monkeypatch):
    apart: list[int] = []
    whole = pipeline._apart
    monkeypatch.setattr(pipeline, "_apart", lambda *given: apart.append(1) or whole(*given))
    store = open_store(str(tmp_path / "films"))
    for number in range(90):
        store.write(f"{number}.png", encoded(grey_film(number, 300, 200)))
    store.write("broken.png", encoded(grey_film(1))[:400])
    store.write("notes.txt", b"of no film")
    store.write("empty.dcm", b"")
    store.write("x.tar", tar({f"{n}.png": encoded(grey_film(n)) for n in range(9)}))
    store.write("two.tif", tiff_of_pages([grey_film(number) for number in (1, 2)]))
    write_tiny_model(str(tmp_path / "model"), image_size=64, is_compiled=True)
    rows = {}
    for model_actors in (None, 1):
        results = str(tmp_path / f"results-{model_actors}")
        lungopacity.screen(
            store.uri, str(tmp_path / "model"), results, batch_size=40, model_actors=model_actors
        )
        assert len(apart) == (model_actors or 0)
        rows[model_actors] = lungopacity.query(
            results, "SELECT * FROM predictions ORDER BY image, member_index, frame"
        ).drop_columns(["run_id", "screened_at", "screened_on"])
    # An actor of its own has another number of threads: some CPUs round the last digit otherwise.
    scores = [name for name in rows[1].column_names if name.startswith(("p_", "logit_"))]
    assert rows[None].drop_columns(scores).equals(rows[1].drop_columns(scores))
    for name in scores:
        np.testing.assert_allclose(rows[None][name], rows[1][name], rtol=0, atol=1e-5)
    assert rows[None].num_rows == 90 + 3 + 9 + 2
    counted = {
        row["values"]: row["counts"] for row in rows[None]["status"].value_counts().to_pylist()
    }
    assert counted == {"ok": 101, "failed": 2, "rejected": 1}


@pytest.mark.usefixtures("ray_cluster")
def test_a_model_with_an_actor_of_its_own_is_given_whole_batches(tmp_path):
    store = open_store(str(tmp_path))
    for number in range(45):
        store.write(f"{number:02d}.png", encoded(grey_film(number)))
    tasks = [take_inventory(store.uri).objects]
    read = ReadSettings(Preprocessing(image_size=1024))
    # Of 1 MiB a film. Batches of more than 64 MiB come in blocks of Ray's own choice.
    for batch_size, expected in ((20, [20, 20, 5]), (3, [9] * 5), (65, [8] * 5 + [5])):
        settings, block_bytes = pipeline._whole_batches(read, batch_size << 20, batch_size)
        blocks = stream_images(store.uri, tasks, settings, block_bytes=block_bytes).materialize()
        assert [ray.get(ref).num_rows for ref in blocks.to_arrow_refs()] == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.usefixtures("ray_cluster")
def test_a_gpu_gives_the_rows_that_cpus_give(tmp_path):
    store = open_store(str(tmp_path / "films"))
    for number in range(40):
        store.write(f"{number:02d}.png", encoded(grey_film(number, 300, 200)))
    store.write("broken.png", b"of no film")
    write_tiny_model(str(tmp_path / "model"), image_size=64, is_compiled=True)
    rows = {}
    for use_gpu in (False, True):
        results = str(tmp_path / f"results-{use_gpu}")
        run = lungopacity.screen(
            store.uri, str(tmp_path / "model"), results, batch_size=7, use_gpu=use_gpu, explain=True
        )
        rows[use_gpu] = lungopacity.query(
            results, "SELECT * FROM predictions ORDER BY image"
        ).to_pandas()
        devices = read_run(open_store(results), run.run_id)["devices"]
        assert (devices == ["cpu"]) != use_gpu
    on_cpu, on_gpu = rows[False], rows[True]
    np.testing.assert_allclose(on_gpu[SCORES], on_cpu[SCORES], rtol=0, atol=1e-4)
    assert on_gpu["status"].tolist() == on_cpu["status"].tolist() == ["ok"] * 40 + ["failed"]
    sure = (on_cpu["p_Lung_Opacity"] - 0.5).abs() > 1e-4
    for column in ("decision", "predicted_label"):
        assert on_gpu[column][sure].tolist() == on_cpu[column][sure].tolist()
    assert on_gpu["explanation"].notna().equals(on_gpu["decision"].eq("positive"))


@pytest.mark.usefixtures("ray_cluster")
def test_a_compiled_network_that_cannot_be_loaded_costs_time_and_no_score(tmp_path, caplog):
    model = tiny_model(image_size=64)
    broken = to_bytes([CompiledNetwork(b"7767517\n1 1\nNoSuchLayer a 0 1 in0\n", b"")])
    save_model(str(tmp_path / "model"), replace(model, compiled=broken), history_parquet())
    store = open_store(str(tmp_path / "films"))
    for number in range(3):
        store.write(f"{number}.png", encoded(grey_film(number)))
    lungopacity.screen(store.uri, str(tmp_path / "model"), str(tmp_path / "results"))
    rows = lungopacity.query(str(tmp_path / "results"), "SELECT * FROM predictions").to_pandas()
    assert rows["status"].tolist() == ["ok"] * 3
    logits_NK = rows[["logit_Normal", "logit_Lung_Opacity"]].to_numpy()
    expected_NK = Scorer(model).probabilities(logits_NK)
    np.testing.assert_allclose(rows[["p_Normal", "p_Lung_Opacity"]], expected_NK, atol=1e-6)
    assert f"model {model.model_id}: ncnn cannot load the compiled network" in caplog.text


@needs_real_data
@pytest.mark.usefixtures("ray_cluster")
def test_real_films_score_alike(tmp_path):
    labels = pd.read_csv(LUNG_FIELDS / "labels.csv", dtype=str)
    write_tiny_model(str(tmp_path / "model"), image_size=64, is_compiled=True)
    shard = f"{LUNG_FIELDS}/images-008.tar"
    import tarfile

    with tarfile.open(shard) as members:
        names = set(members.getnames())
    labels = labels[labels["image"].isin(names)]
    labels = labels[labels["label"].isin(["Normal", "Lung_Opacity"])].drop(columns="split")
    assert assert_same_scores(shard, labels, tmp_path) == len(labels)
