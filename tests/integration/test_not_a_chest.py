"""What a header calls a chest, and is none, comes out flagged; real chests do not."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageFilter
from pydicom.data import get_testdata_file
from sklearn.datasets import load_sample_images

import lungopacity
from lungopacity.storage import open_store
from tests.films import dicom, encoded
from tests.real_data import LUNG_FIELDS, needs_real_data

Grey = npt.NDArray[np.uint8]


def declared_chest(pixels: Grey) -> bytes:
    return dicom(
        pixels.astype(np.uint16) * 16, Modality="DX", BodyPartExamined="CHEST", ViewPosition="PA"
    )


def hand(seed: int) -> Grey:
    """Five fingers of bright bones in soft tissue, on black."""
    rng = np.random.default_rng(seed)
    image = Image.new("L", (400, 400), 0)
    draw = ImageDraw.Draw(image)
    draw.ellipse((120, 200, 290, 390), fill=90)
    for finger in range(5):
        x, top = 110 + 45 * finger, int(rng.integers(20, 110))
        draw.line((x, 260, x + rng.integers(-20, 20), top), fill=90, width=38)
        for bone in range(3):
            y = top + 15 + bone * (240 - top) // 3
            draw.line((x, y, x, y + (180 - top) // 3 + 30), fill=210, width=16)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(2)))


def step_wedge(_: int) -> Grey:
    steps = np.repeat(np.linspace(20, 240, 10), 40).astype(np.uint8)
    return np.tile(steps, (400, 1))


def photograph(seed: int) -> Grey:
    picture = load_sample_images().images[seed % 2]
    top, left = np.random.default_rng(seed).integers(0, 200, 2)
    return np.asarray(Image.fromarray(picture[top : top + 220, left : left + 220]).convert("L"))


def slice_of_a_body(_: int) -> Grey:
    from pydicom import dcmread

    stored = dcmread(str(get_testdata_file("CT_small.dcm", download=False))).pixel_array
    stretched = (stored - stored.min()) * (255.0 / np.ptp(stored))
    return np.asarray(Image.fromarray(stretched.astype(np.uint8)).resize((400, 400)))


def noise(seed: int) -> Grey:
    return np.random.default_rng(seed).integers(0, 256, (400, 400), dtype=np.uint8)


NOT_CHESTS = {
    "hand": hand,
    "wedge": step_wedge,
    "photograph": photograph,
    "slice": slice_of_a_body,
    "noise": noise,
}


def films_of(labels: pd.DataFrame, split: str, count: int) -> dict[str, bytes]:
    wanted = set(labels[labels["split"] == split].groupby("label").head(count)["image"])
    found = {}
    for path in sorted(LUNG_FIELDS.glob("*.tar")):
        with tarfile.open(path) as shard:
            for member in shard:
                if member.name in wanted:
                    found[member.name] = shard.extractfile(member).read()
    return found


@needs_real_data
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.timeout(280)
def test_a_small_model_of_real_films_knows_what_is_no_chest(tmp_path):
    labels = pd.read_csv(LUNG_FIELDS / "labels.csv", dtype={"patient_id": str})
    labels = labels[labels["label"].isin(["Normal", "Lung_Opacity"])]
    learned = films_of(labels, "train", 300) | films_of(labels, "validation", 150)
    unseen = films_of(labels, "test", 120)
    store = open_store(str(tmp_path / "films"))
    for name, data in learned.items():
        store.write(name, data)
    labels[labels["image"].isin(learned)].to_csv(tmp_path / "labels.csv", index=False)
    model = str(tmp_path / "model")
    lungopacity.train([store.uri], str(tmp_path / "labels.csv"), model, image_size=96, epochs=4)

    archive = open_store(str(tmp_path / "archive"))
    for number, data in enumerate(unseen.values()):
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
        archive.write(f"chest-{number}.dcm", declared_chest(pixels))
        if number % 4 == 0:
            archive.write(f"turned-{number}.png", encoded(np.rot90(pixels)))
    others = open_store(str(tmp_path / "others"))
    for kind, draw in NOT_CHESTS.items():
        for seed in range(6):
            data = declared_chest(draw(seed))
            archive.write(f"{kind}-{seed}.dcm", data)
            others.write(f"{kind}-{seed}.dcm", data)
    result = lungopacity.screen(archive.uri, model, str(tmp_path / "results"))
    assert result.failed == 0
    rows = lungopacity.query(
        str(tmp_path / "results"),
        "SELECT split_part(image, '-', 1) kind, status, quality_out_of_distribution unlike, "
        "out_of_distribution_score score FROM predictions",
    ).to_pandas()
    # Flagged, or rejected for a fault that needs no model. The model is a poor one, of one minute.
    seen = rows.assign(seen=(rows["status"] == "rejected") | rows["unlike"].eq(True))
    found = seen[seen["kind"].isin(NOT_CHESTS)].groupby("kind")["seen"].mean()
    assert len(found) == len(NOT_CHESTS)
    assert found.min() > 0.6, found
    assert found.mean() > 0.9, found
    chests = rows[rows["kind"] == "chest"]
    assert (chests["status"] == "ok").all()
    assert chests["unlike"].mean() <= 0.05
    assert rows.loc[rows["kind"] == "turned", "unlike"].mean() > 0.9

    strict = lungopacity.screen(
        others.uri, model, str(tmp_path / "results"), reject_quality=["out_of_distribution"]
    )
    refused = lungopacity.query(
        str(tmp_path / "results"),
        "SELECT count(*) n, count(p_Normal) scored, count(decision) decided, "
        "min(error_code) code, min(error_stage) stage "
        f"FROM predictions WHERE run_id = '{strict.run_id}' "
        f"AND quality_out_of_distribution",
    ).to_pylist()[0]
    assert refused["n"] > 20
    assert (refused["scored"], refused["decided"]) == (0, 0)
    assert (refused["code"], refused["stage"]) == ("poor_quality", "score")
