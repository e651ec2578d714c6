"""More than two classes, merged and left out by words, through every command that has scores."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import lungopacity
from lungopacity.cli import main
from lungopacity.models import (
    films_known_to,
    load_model,
    read_history,
    read_validation,
    save_model,
)
from lungopacity.storage import open_store
from tests.films import encoded, grey_film

WORDS = "Normal,COVID+Viral_Pneumonia=Viral infection,Lung_Opacity,Not_Normal,Effusion,-TB"
NAMES = ["Normal", "Viral infection", "Lung_Opacity", "Not_Normal", "Effusion"]
COLUMNS = ["Normal", "Viral_infection", "Lung_Opacity", "Not_Normal", "Effusion"]
CLASS_OF = {"COVID": "Viral infection", "Viral_Pneumonia": "Viral infection"}
LABELS = ["Normal", "COVID", "Viral_Pneumonia", "Lung_Opacity", "Not_Normal", "TB", "Effusion"]
FILMS = {"train": 16, "validation": 8, "test": 6}
"""Of each label."""


def write_films(folder: Path) -> None:
    """An archive and `labels.csv`. A label shows by how broad the white stripes are."""
    store = open_store(str(folder / "archive"))
    rows = []
    for number, label in enumerate(LABELS):
        for split in [split for split, films in FILMS.items() for _ in range(films)]:
            film = grey_film(len(rows), 128, 128).copy()
            film[np.arange(128) % 16 < 2 * number] = 255
            rows.append({"image": f"{len(rows):03}.png", "label": label, "split": split})
            store.write(rows[-1]["image"], encoded(film))
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)


def check_scores(rows: pd.DataFrame) -> None:
    assert [name for name in rows if name.startswith("p_")] == [f"p_{name}" for name in COLUMNS]
    p_NK = rows[[f"p_{name}" for name in COLUMNS]].to_numpy()
    np.testing.assert_allclose(p_NK.sum(axis=1), 1, atol=1e-5)
    assert rows["predicted_label"].tolist() == [NAMES[index] for index in p_NK.argmax(axis=1)]


@pytest.mark.usefixtures("ray_cluster")
def test_five_classes_train_evaluate_go_together_and_screen(tmp_path) -> None:
    write_films(tmp_path)
    films, labels, model = (str(tmp_path / name) for name in ("archive", "labels.csv", "model"))
    options = (
        "--image-size 32 --epochs 12 --batch-size 16 --no-gpu --set learning_rate=0.01 "
        "--set ema_decay=0 --set augmentation.gain=0 --set augmentation.gamma=0 "
        "--set model_settings.channels=[8,16,16] --set model_settings.convolutions=[1,1,1]"
    )
    where = ["--images", films, "--labels", labels, "--output", model, "--classes", WORDS]
    assert main(["train", *where, *options.split()]) == 0
    trained = load_model(model)
    assert (list(trained.spec.class_names), trained.spec.positive_class) == (NAMES, "Lung_Opacity")
    assert trained.spec.class_biases is not None
    assert len(trained.spec.class_biases) == 5
    kept = pd.read_parquet(io.BytesIO(read_validation(model)))
    logits = [f"logit_{one}" for one in COLUMNS]
    assert list(kept) == ["content_sha256", "label", "view_position", *logits]

    report = lungopacity.evaluate(model, [films], labels, str(tmp_path / "report"))
    assert report.images == 36
    assert report.value("support", "Viral infection") == 12
    assert report.value("accuracy") > 0.6
    for metric in ("precision", "recall", "f1", "specificity", "roc_auc", "average_precision"):
        assert all(0 <= report.value(metric, name) <= 1 for name in NAMES)
    check_scores(pd.read_parquet(tmp_path / "report" / "predictions.parquet"))
    table, card, figure = (
        (tmp_path / "report" / name).read_text()
        for name in ("table1.txt", "model_card.md", "roc.svg")
    )
    assert all(f"\n{name} " in table and name in card and name in figure for name in NAMES)
    assert "COVID as Viral infection" in card
    assert "TB" not in table + figure
    assert "of no class, train: 16 TB; of no class, validation: 8 TB" in card
    for name in ("confusion_matrix", "roc", "precision_recall", "reliability", "history"):
        assert (tmp_path / "report" / f"{name}.png").exists()

    # The same network, calibrated otherwise, is another model that learnt from the same films.
    spec = replace(trained.spec, temperature=2 * trained.spec.temperature)
    second, both = str(tmp_path / "second"), str(tmp_path / "both")
    save_model(second, replace(trained, spec=spec), read_history(model), read_validation(model))
    assert list(lungopacity.ensemble([model, second], both).spec.class_names) == NAMES
    run = lungopacity.screen(films, both, str(tmp_path / "results"), labels=labels)
    assert run.ok == run.images == 30 * len(LABELS)
    rows = lungopacity.query(str(tmp_path / "results"), "SELECT * FROM predictions").to_pandas()
    check_scores(rows)
    assert rows["ensemble_disagreement"].max() > 0
    metrics = lungopacity.query(
        str(tmp_path / "results"),
        "SELECT class, value FROM metrics WHERE metric = 'recall' AND \"group\" = 'all'",
    ).to_pydict()
    rows = rows[~rows["content_sha256"].isin(list(films_known_to(both)))]
    rows = rows[rows["label"] != "TB"].assign(label=lambda told: told["label"].replace(CLASS_OF))
    recalls = (rows["predicted_label"] == rows["label"]).groupby(rows["label"]).mean()
    assert dict(zip(metrics["class"], metrics["value"], strict=True)) == pytest.approx(
        recalls.to_dict()
    )
