"""What a user would write instead of `lungopacity screen`, each as its own documentation has it.

Each reads loose images, scores them with the same network in float32, and writes Parquet: image,
p_…, scored_at (seconds). None of them looks at quality, keeps a film that cannot be read, checks a
digest, or can be stopped and go on; that is what screening does for its time.

- `dataloader`: torch's DataLoader, a worker a core, boto3 and Pillow, and a loop.
- `ray-read-images`: `ray.data.read_images`, `map_batches` with an actor, `write_parquet`.
- `ray-download`: a list of URIs, `download()`, decoding in `map_batches`, the same actor.
- `daft`: `download`, `decode_image`, `resize`, a class UDF, `write_parquet`.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lungopacity.archive.inventory import take_inventory
from lungopacity.models import load_model
from lungopacity.results.schema import class_column
from lungopacity.runtime import quiet_ray_data, ray_session
from lungopacity.storage import join_uri, open_store

if TYPE_CHECKING:
    import torch

Pixels = npt.NDArray[np.uint8]


class _Model:
    """The network of a model folder, as one would call it by hand."""

    def __init__(self, model: str) -> None:
        import torch

        self.trained = load_model(model)
        self.size = self.trained.spec.preprocessing.image_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = self.trained.network().to(self.device)
        self.network: torch.nn.Module = network.to(memory_format=torch.channels_last)

    def __call__(self, pixels_NHW: Pixels) -> npt.NDArray[np.float32]:
        """(n, classes) probabilities."""
        import torch

        settings = self.trained.spec.preprocessing
        with torch.inference_mode():
            x_N1HW = torch.from_numpy(pixels_NHW).to(self.device).unsqueeze(1).float().div_(255)
            x_N1HW = x_N1HW.sub_(settings.mean).div_(settings.std)
            logits_NK = self.network(x_N1HW.contiguous(memory_format=torch.channels_last))
        return self.trained.spec.probabilities(logits_NK.float().cpu().numpy())

    def columns(self, pixels_NHW: Pixels) -> dict[str, Any]:
        """p_… and scored_at of a batch."""
        probabilities_NK = self(pixels_NHW)
        names = self.trained.spec.class_names
        columns = {
            class_column("p", name): probabilities_NK[:, index] for index, name in enumerate(names)
        }
        return {**columns, "scored_at": np.full(len(pixels_NHW), time.time())}


def _decoded(data: bytes, size: int) -> Pixels:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        # For JPEG: decode no more pixels than are needed.
        image.draft("L", (size, size))
        grey = image.convert("L").resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(grey)


class _Films:
    """A map-style dataset of torch's DataLoader."""

    def __init__(self, uri: str, keys: list[str], size: int) -> None:
        self.uri, self.keys, self.size = uri, keys, size
        self.get: Callable[[str], bytes] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[str, Pixels]:
        if self.get is None:
            self.get = _getter(self.uri)
        key = self.keys[index]
        return key, _decoded(self.get(key), self.size)


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


def dataloader(images: str, model: str, output: str, batch_size: int) -> None:
    """torch's DataLoader and a loop."""
    import torch.utils.data

    scorer = _Model(model)
    archive = take_inventory(images)
    films: Any = _Films(archive.uri, archive.objects["image"].to_pylist(), scorer.size)
    loader = torch.utils.data.DataLoader(
        films,
        batch_size=batch_size,
        num_workers=len(os.sched_getaffinity(0)),
        pin_memory=torch.cuda.is_available(),
        # boto3 and a process that was forked from one with threads do not go together.
        multiprocessing_context="spawn",
    )
    tables = [
        pa.table({"image": list(keys), **scorer.columns(pixels_NHW.numpy())})
        for keys, pixels_NHW in loader
    ]
    pq.write_table(pa.concat_tables(tables), f"{output}/predictions.parquet")


def ray_read_images(images: str, model: str, output: str, batch_size: int) -> None:
    """Ray Data's recipe for batch inference on images."""
    import ray

    size = load_model(model).spec.preprocessing.image_size
    filesystem, root = _filesystem(images)
    with ray_session():
        quiet_ray_data()
        films = ray.data.read_images(
            root, filesystem=filesystem, mode="L", size=(size, size), include_paths=True
        )
        _ray_scored(films, "image", "path", model, batch_size).write_parquet(output)
        _say_bytes_moved()


def ray_download(images: str, model: str, output: str, batch_size: int) -> None:
    """Ray Data's recipe for a list of URIs."""
    import ray
    from ray.data.expressions import download

    size = load_model(model).spec.preprocessing.image_size
    filesystem, root = _filesystem(images)
    keys = take_inventory(images).objects["image"].to_pylist()

    def decode(batch: dict[str, Any]) -> dict[str, Any]:
        pixels = np.stack([_decoded(data, size) for data in batch["bytes"]])
        return {"uri": batch["uri"], "image": pixels}

    with ray_session():
        quiet_ray_data()
        films = (
            ray.data.from_items([{"uri": f"{root}/{key}"} for key in keys])
            .with_column("bytes", download("uri", filesystem=filesystem))
            .map_batches(decode)
        )
        _ray_scored(films, "image", "uri", model, batch_size).write_parquet(output)
        _say_bytes_moved()


def _ray_scored(films: Any, pixels: str, name: str, model: str, batch_size: int) -> Any:
    import ray

    class Score:
        def __init__(self) -> None:
            self.model = _Model(model)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            films = np.ascontiguousarray(batch[pixels])
            return {"image": batch[name], **self.model.columns(films)}

    gpus = int(ray.cluster_resources().get("GPU", 0))
    cpus = int(ray.cluster_resources()["CPU"])
    return films.map_batches(
        Score,
        batch_size=batch_size,
        num_gpus=1 if gpus else None,
        # With a CPU each, as the recipe has it, two CPUs are taken by actors (one plans downloads)
        # and none is left to read: the job hangs without a word.
        num_cpus=0 if cpus <= 2 else 1,
        compute=ray.data.ActorPoolStrategy(size=gpus or max(1, cpus - 2)),
    )


def _filesystem(images: str) -> tuple[Any, str]:
    store = open_store(images)
    if images.startswith("s3://"):
        return store.arrow_filesystem()
    return None, store.uri.removeprefix("file://")


def daft(images: str, model: str, output: str, batch_size: int) -> None:
    """Daft's recipe for batch inference on images."""
    import daft
    from daft import DataType, col
    from daft.functions import decode_image, download
    from daft.functions.image import resize
    from daft.io import IOConfig, S3Config

    trained = load_model(model)
    size, names = trained.spec.preprocessing.image_size, trained.spec.class_names
    archive = take_inventory(images)
    keys = archive.objects["image"].to_pylist()
    config = None
    if archive.uri.startswith("s3://"):
        config = IOConfig(
            s3=S3Config(
                endpoint_url=os.environ.get("AWS_ENDPOINT_URL"),
                use_ssl=not os.environ.get("AWS_ENDPOINT_URL", "").startswith("http:"),
            )
        )
    fields = {class_column("p", name): DataType.float32() for name in names}
    fields["scored_at"] = DataType.float64()

    @daft.cls
    class Score:
        def __init__(self) -> None:
            self.model = _Model(model)

        @daft.method.batch(return_dtype=DataType.struct(fields), unnest=True, batch_size=batch_size)
        def score(self, films: Any) -> Any:
            pixels_NHW = np.stack(films.to_pylist()).reshape(-1, size, size)
            return pa.table(self.model.columns(pixels_NHW)).to_struct_array().combine_chunks()

    frame = daft.from_pydict({"image": keys, "uri": [join_uri(archive.uri, key) for key in keys]})
    frame = frame.with_column(
        "film", resize(decode_image(download(col("uri"), io_config=config), mode="L"), size, size)
    )
    frame.select(col("image"), Score().score(col("film"))).write_parquet(output)


def ours(images: str, model: str, output: str, batch_size: int) -> None:
    """`lungopacity screen` inside of a Ray that can be asked afterwards what went through it."""
    from lungopacity.screening.screen import screen

    with ray_session():
        screen(images, model, output, batch_size=batch_size)
        _say_bytes_moved()


def _say_bytes_moved() -> None:
    """Print how many bytes went through the object stores of all nodes, for whoever started us."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    # Any node asks all the others.
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    moved = get_memory_info_reply(state).store_stats.cumulative_created_bytes
    print(json.dumps({"bytes_moved": moved}))


WAYS: dict[str, Callable[[str, str, str, int], None]] = {
    "ours": ours,
    "dataloader": dataloader,
    "ray-read-images": ray_read_images,
    "ray-download": ray_download,
    "daft": daft,
}

if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    WAYS[given["way"]](given["images"], given["model"], given["output"], given["batch_size"])
