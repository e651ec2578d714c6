import multiprocessing

import numpy as np
import pyarrow as pa

from lungopacity.archive.content import ReadSettings, content_rows
from lungopacity.archive.inventory import take_inventory
from lungopacity.archive.reading import read_files
from lungopacity.benchmark.bare_loop import _films, _turns_of
from lungopacity.radiograph import Preprocessing
from lungopacity.results.schema import PLAN_SCHEMA
from lungopacity.storage import open_store
from tests.films import encoded, grey_film, tiff_of_pages
from tests.models.tiny import tiny_model


def test_it_shows_the_network_what_screening_shows_it(tmp_path):
    store = open_store(str(tmp_path))
    # Less is left between the borders than the scale of the JPEG was chosen for.
    wide = np.zeros((1200, 1200), np.uint8)
    wide[400:800, 420:760] = grey_film(1, 400, 340) // 2 + 100
    store.write("a/IM1.jpg", encoded(wide, "JPEG", quality=92))
    store.write("b/IM1.jpg", encoded(grey_film(2, 300, 200), "JPEG"))
    store.write("c.tif", tiff_of_pages([grey_film(n, 200, 180) for n in (3, 4)]))
    model = tiny_model(preprocessing=Preprocessing(64, crop_borders=True))
    archive = take_inventory(str(tmp_path))
    turns = _turns_of(archive.objects, processes=2)
    found = dict(_films(archive.uri, turns, model, multiprocessing.Value("q", 0)))
    settings = ReadSettings(model.spec.preprocessing)
    expected = {
        (image, member, row["frame"]): row.get("pixels")
        for image, member, data in read_files(archive.store, archive.objects, settings)
        for row in content_rows(data, settings)
    }
    assert len(expected) == 4
    assert {name: pixels.tobytes() for name, pixels in found.items()} == expected


def test_few_images_have_work_for_every_process():
    rows = [
        {"image": f"{number}.png", "source_etag": "e", "source_size_bytes": 1,
         "source_modified_at": 0, "is_shard": False}
        for number in range(1000)
    ]  # fmt: skip
    objects = pa.Table.from_pylist(rows, PLAN_SCHEMA)
    assert len(_turns_of(objects.slice(0, 3), processes=2)) == 3
    assert [turn.num_rows for turn in _turns_of(objects.slice(0, 64), processes=4)] == [4] * 16
    assert max(turn.num_rows for turn in _turns_of(objects, processes=1)) == 128
