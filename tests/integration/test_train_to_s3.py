"""The whole first journey in object storage: films, labels, checkpoints, model and report."""

from __future__ import annotations

import pytest

import lungopacity
from lungopacity.archive.phantom import PhantomSettings, write_phantom_archive
from lungopacity.models import load_model
from lungopacity.storage import open_store


@pytest.mark.usefixtures("ray_cluster")
def test_films_labels_checkpoints_model_and_report_may_all_lie_in_s3(s3_uri):
    write_phantom_archive(open_store(s3_uri), PhantomSettings(images=80, image_size=96))
    archive, labels = f"{s3_uri}/archive", f"{s3_uri}/labels.csv"
    model = f"{s3_uri}/models/first"
    result = lungopacity.train(
        [archive],
        labels,
        model,
        image_size=64,
        epochs=2,
        batch_size=16,
        seed=3,
        settings={"model_settings.channels": "[8,16]", "model_settings.convolutions": "[1,1]"},
    )
    assert [row["epoch"] for row in result.history] == [1, 2]
    loaded = load_model(model)
    assert loaded.model_id == result.model.model_id
    assert loaded.spec.synthetic
    assert loaded.spec.preprocessing.image_size == 64
    # Compiled for CPUs, if that was faster just then.
    left = {item.key for item in open_store(model).list()} - {"compiled.safetensors"}
    assert left == {
        "SHA256SUMS",
        "distribution.safetensors",
        "history.parquet",
        "model.json",
        "model.safetensors",
        "validation.parquet",
        "training_films.parquet",
    }

    report = lungopacity.evaluate(model, [archive], labels, f"{s3_uri}/report", split="all")
    assert (report.images, report.unreadable, report.synthetic) == (80, 0, True)
    for name in ("confusion_matrix.png", "roc.svg", "model_card.md"):
        assert open_store(f"{s3_uri}/report").head(name) is not None
    with pytest.raises(lungopacity.UserError, match="holds a finished model"):
        lungopacity.train([archive], labels, model)
