"""What a user would write instead of `lungopacity screen`, each way as its documentation shows it.

Each way reads loose images whose suffix Pillow knows, decodes them to grey pixels with its own
library, gives the network the same square as screening, scores in the same precision, and writes
Parquet: image, p_…, scored_at (seconds). None of them checks quality, keeps a row for a film that
cannot be read, checks a digest, or can be stopped and resumed. Screening spends time on all these.

- `dataloader`: torch's DataLoader with a worker for each core, boto3 and Pillow, and a loop.
- `ray-read-images`: `ray.data.read_images`, `map_batches` to squares, `map_batches` with an actor,
  `write_parquet`.
- `ray-download`: a list of URIs, `download()`, decoding in `map_batches`, the same actor.
- `daft`: `download`, `decode_image`, a class UDF, `write_parquet`.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lungopacity.archive.inventory import take_inventory
from lungopacity.errors import UserError
from lungopacity.models import load_model
from lungopacity.models.scorer import BFLOAT16, FLOAT32, exact_float32
from lungopacity.radiograph import Preprocessing
from lungopacity.results.schema import class_column
from lungopacity.runtime import quiet_ray_data, ray_session, worker_environment
from lungopacity.runtime.ray_internals import bytes_moved
from lungopacity.storage import join_uri, open_store

if TYPE_CHECKING:
    import torch

Pixels = npt.NDArray[np.uint8]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif")
"""What Ray's `read_images` takes for images. The other ways are given the same."""


@dataclass(frozen=True)
class Task:
    """What to score, and how."""

    way: str
    """One of `WAYS`."""
    images: str
    """URI."""
    model: str
    """URI."""
    output: str
    """URI of a folder for Parquet files."""
    batch_size: int
    use_gpu: bool = False
    precision: str = FLOAT32
    """One of `PRECISIONS`."""


class _Model:
    """The network of a model folder, called as one would call it by hand."""

    def __init__(self, task: Task, threads: int | None = None) -> None:
        """`threads`: None is torch's own choice."""
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self.trained = load_model(task.model)
        self.device = torch.device("cuda" if task.use_gpu else "cpu")
        if task.use_gpu:
            exact_float32()  # as screening does
        self.half = task.precision == BFLOAT16
        network = self.trained.network().to(self.device)
        self.network: torch.nn.Module = network.to(memory_format=torch.channels_last)

    def __call__(self, pixels_NHW: Pixels) -> npt.NDArray[np.float32]:
        """(n, classes) probabilities."""
        import torch

        settings = self.trained.spec.preprocessing
        with torch.inference_mode():
            x_N1HW = torch.from_numpy(pixels_NHW).to(self.device).unsqueeze(1).float().div_(255)
            x_N1HW = x_N1HW.sub_(settings.mean).div_(settings.std)
            x_N1HW = x_N1HW.contiguous(memory_format=torch.channels_last)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                logits_NK = self.network(x_N1HW)
        return self.trained.spec.probabilities(logits_NK.float().cpu().numpy())

    def columns(self, pixels_NHW: Pixels) -> dict[str, Any]:
        """The columns p_… and scored_at of a batch."""
        probabilities_NK = self(pixels_NHW)
        names = self.trained.spec.class_names
        columns = {
            class_column("p", name): probabilities_NK[:, index] for index, name in enumerate(names)
        }
        return {**columns, "scored_at": np.full(len(pixels_NHW), time.time())}


def _square(data: bytes, preprocessing: Preprocessing) -> Pixels:
    """The network's input, from a file that Pillow reads."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        # For JPEG: decode no more pixels than screening does.
        scale = preprocessing.at_least / max(image.size)
        image.draft("L", (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        return preprocessing.square(np.asarray(image.convert("L")))


class _Films:
    """A map-style dataset for torch's DataLoader."""

    def __init__(self, uri: str, keys: list[str], preprocessing: Preprocessing) -> None:
        self.uri, self.keys, self.preprocessing = uri, keys, preprocessing
        self.get: Callable[[str], bytes] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[str, Pixels]:
        if self.get is None:
            self.get = _getter(self.uri)
        key = self.keys[index]
        return key, _square(self.get(key), self.preprocessing)


def _getter(uri: str) -> Callable[[str], bytes]:
    if not uri.startswith("s3://"):
        folder = Path(open_store(uri).uri.removeprefix("file://"))
        return lambda key: (folder / key).read_bytes()
    import boto3

    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    client = boto3.client("s3")

    def get(key: str) -> bytes:
        body: bytes = client.get_object(Bucket=bucket, Key=f"{prefix}/{key}".lstrip("/"))[
            "Body"
        ].read()
        return body

    return get


def _image_keys(images: str) -> tuple[str, list[str]]:
    """URI of the root, and the keys. Tables and notes beside films are left out, as a user would
    do."""
    archive = take_inventory(images)
    keys = [
        key for key in archive.objects["image"].to_pylist() if key.lower().endswith(IMAGE_SUFFIXES)
    ]
    if not keys:
        raise UserError(f"no key ends with {', '.join(IMAGE_SUFFIXES)}")
    return archive.uri, keys


def dataloader(task: Task) -> None:
    """torch's DataLoader and a loop."""
    import torch.utils.data

    scorer = _Model(task)
    root, keys = _image_keys(task.images)
    films: Any = _Films(root, keys, scorer.trained.spec.preprocessing)
    loader = torch.utils.data.DataLoader(
        films,
        batch_size=task.batch_size,
        num_workers=len(os.sched_getaffinity(0)),
        pin_memory=task.use_gpu,
        # boto3 does not work in a process that was forked from one with threads.
        multiprocessing_context="spawn",
    )
    tables = [
        pa.table({"image": list(keys), **scorer.columns(pixels_NHW.numpy())})
        for keys, pixels_NHW in loader
    ]
    pq.write_table(pa.concat_tables(tables), f"{task.output}/predictions.parquet")


def ray_read_images(task: Task) -> None:
    """Ray Data's recipe for batch inference on images."""
    import ray

    preprocessing = load_model(task.model).spec.preprocessing
    filesystem, root = _filesystem(task.images)

    def square(batch: dict[str, Any]) -> dict[str, Any]:
        pixels = np.stack([preprocessing.square(film) for film in batch["image"]])
        return {"path": batch["path"], "image": pixels}

    with ray_session(), _bytes_moved_printed():
        quiet_ray_data()
        films = ray.data.read_images(
            root, filesystem=filesystem, mode="L", include_paths=True
        ).map_batches(square)
        _write(_ray_scored(films, "path", root, task), task.output)


def ray_download(task: Task) -> None:
    """Ray Data's recipe for a list of URIs."""
    import ray
    from ray.data.expressions import download

    preprocessing = load_model(task.model).spec.preprocessing
    uri, keys = _image_keys(task.images)
    filesystem, root = _filesystem(uri)

    def decode(batch: dict[str, Any]) -> dict[str, Any]:
        pixels = np.stack([_square(data, preprocessing) for data in batch["bytes"]])
        return {"uri": batch["uri"], "image": pixels}

    with ray_session(), _bytes_moved_printed():
        quiet_ray_data()
        films = (
            ray.data.from_items([{"uri": f"{root}/{key}"} for key in keys])
            .with_column("bytes", download("uri", filesystem=filesystem))
            .map_batches(decode)
        )
        _write(_ray_scored(films, "uri", root, task), task.output)


def _write(scored: Any, output: str) -> None:
    filesystem, root = _filesystem(output)
    scored.write_parquet(root, filesystem=filesystem)


def _ray_scored(films: Any, name: str, root: str, task: Task) -> Any:
    """`name`: the column of paths below `root`."""
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0)) if task.use_gpu else 0
    cpus = int(ray.cluster_resources()["CPU"])
    actors = gpus or max(1, cpus - 2)
    # Ray gives an actor as many threads as CPUs are reserved for it, and one if none are.
    threads = max(1, cpus // actors)

    class Score:
        def __init__(self) -> None:
            self.model = _Model(task, threads)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            films = np.ascontiguousarray(batch["image"])
            keys = [path.removeprefix(f"{root}/") for path in batch[name]]
            return {"image": np.array(keys), **self.model.columns(films)}

    return films.map_batches(
        Score,
        batch_size=task.batch_size,
        num_gpus=1 if gpus else None,
        # If each actor took a CPU, as in the recipe, actors would take both of two CPUs (one plans
        # downloads) and leave none to read: the job would hang silently.
        num_cpus=0 if cpus <= 2 else 1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        runtime_env=worker_environment(task.use_gpu),
    )


def _filesystem(images: str) -> tuple[Any, str]:
    store = open_store(images)
    if images.startswith("s3://"):
        return store.arrow_filesystem()
    return None, store.uri.removeprefix("file://")


def daft(task: Task) -> None:
    """Daft's recipe for batch inference on images."""
    import daft
    from daft import DataType, col
    from daft.functions import decode_image, download
    from daft.io import IOConfig, S3Config

    trained = load_model(task.model)
    preprocessing, names = trained.spec.preprocessing, trained.spec.class_names
    root, keys = _image_keys(task.images)
    config = None
    if root.startswith("s3://"):
        config = IOConfig(
            s3=S3Config(
                endpoint_url=os.environ.get("AWS_ENDPOINT_URL"),
                use_ssl=not os.environ.get("AWS_ENDPOINT_URL", "").startswith("http:"),
            )
        )
    fields = {class_column("p", name): DataType.float32() for name in names}
    fields["scored_at"] = DataType.float64()

    @daft.cls(gpus=1 if task.use_gpu else 0)
    class Score:
        def __init__(self) -> None:
            self.model = _Model(task)

        @daft.method.batch(
            return_dtype=DataType.struct(fields), unnest=True, batch_size=task.batch_size
        )
        def score(self, films: Any) -> Any:
            # Each is (height, width, 1).
            squares = [preprocessing.square(film[:, :, 0]) for film in films.to_pylist()]
            return (
                pa.table(self.model.columns(np.stack(squares))).to_struct_array().combine_chunks()
            )

    frame = daft.from_pydict({"image": keys, "uri": [join_uri(root, key) for key in keys]})
    frame = frame.with_column(
        "film", decode_image(download(col("uri"), io_config=config), mode="L")
    )
    frame.select(col("image"), Score().score(col("film"))).write_parquet(task.output)


def ours(task: Task) -> None:
    """`lungopacity screen` inside a Ray that can be asked afterwards what went through it."""
    from lungopacity.screening.screen import screen

    with ray_session(), _bytes_moved_printed():
        screen(
            task.images,
            task.model,
            task.output,
            batch_size=task.batch_size,
            use_gpu=task.use_gpu,
            precision=task.precision,
            reject_quality=(),
        )


@contextmanager
def _bytes_moved_printed() -> Iterator[None]:
    """Print how many bytes went through Ray in the block, for the process that started this one."""
    before = bytes_moved()
    yield
    after = bytes_moved()
    if before is not None and after is not None:
        print(json.dumps({"bytes_moved": after - before}))


WAYS: dict[str, Callable[[Task], None]] = {
    "ours": ours,
    "dataloader": dataloader,
    "ray-read-images": ray_read_images,
    "ray-download": ray_download,
    "daft": daft,
}

if __name__ == "__main__":
    given = Task(**json.loads(Path(sys.argv[1]).read_text()))
    WAYS[given.way](given)
