"""What is measured if the user gives nothing: phantoms, and an untrained network."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from tempfile import TemporaryDirectory

from lungopacity.archive.phantom import PhantomSettings, write_phantom_archive
from lungopacity.errors import UserError
from lungopacity.models import (
    ModelSpec,
    OperatingPoint,
    TrainedModel,
    build_network,
    network_card,
    save_model,
    weights_of,
)
from lungopacity.progress import Progress
from lungopacity.storage import join_uri, open_store

DEFAULT_NETWORK = "classical-cnn"
_PHANTOM_SIDE = 256


@dataclass
class Inputs:
    """URIs of films, of their labels and of a model folder."""

    images: str
    labels: str
    model: str
    notes: list[str] = field(default_factory=list)
    """What was made up."""


@contextmanager
def scratch_place(output: str | None) -> Iterator[str]:
    """URI of a new place below `output`, or of a new folder on this machine. It is removed after
    the block."""
    if output is None:
        with TemporaryDirectory(prefix="lungopacity-") as folder:
            yield folder
        return
    place = join_uri(output, f"benchmark-{uuid.uuid4().hex}")
    try:
        yield place
    finally:
        store = open_store(place)
        with suppress(UserError):
            for item in list(store.list()):
                store.delete(item.key)


@contextmanager
def made_up(
    images: str | None, model: str | None, *, count: int, output: str | None = None
) -> Iterator[Inputs]:
    """The user's films and model, with stand-ins for those that are None.

    `count`: phantoms to draw; those in DICOM, which the other ways do not read, are left out.
    `output`: see `scratch_place`. Raises `UserError`.
    """
    with scratch_place(output) as place:
        found = Inputs(images or "", "", model or "")
        if images is None:
            found.images, found.labels = _write_phantoms(place, count)
            found.notes.append(f"films: up to {count} phantoms of {_PHANTOM_SIDE} pixels a side")
        if model is None:
            found.model = join_uri(place, "model")
            save_model(found.model, fresh_model(DEFAULT_NETWORK))
            found.notes.append(f"model: {DEFAULT_NETWORK}, untrained, in torch")
        yield found


def _write_phantoms(place: str, count: int) -> tuple[str, str]:
    try:
        settings = PhantomSettings(images=count, image_size=_PHANTOM_SIDE, shard_fraction=0.0)
    except ValueError as error:
        raise UserError("--count must be at least 1") from error
    place = join_uri(place, "phantoms")
    store = open_store(place)
    with Progress("Drawing phantoms", total=count) as progress:
        write_phantom_archive(store, settings, progress.advance)
    labels = store.read("labels.csv").decode().splitlines(keepends=True)
    for item in list(store.list()):
        if item.key.endswith(".dcm"):
            store.delete(item.key)
    kept = [line for line in labels if not line.split(",", 1)[0].endswith(".dcm")]
    store.write("labels.csv", "".join(kept).encode())
    return join_uri(place, "archive"), join_uri(place, "labels.csv")


def fresh_model(name: str) -> TrainedModel:
    """A network of this name with initial weights, at the input size of its recipe."""
    card = network_card(name)
    network = build_network(name, 2, {"image_size": card.image_size} if card.fixed_size else {})
    spec = ModelSpec(
        architecture=name,
        architecture_settings=asdict(network.settings),  # type: ignore[call-overload]
        class_names=("Normal", "Lung_Opacity"),
        positive_class="Lung_Opacity",
        preprocessing=card.preprocessing,
        operating_point=OperatingPoint(0.5),
    )
    return TrainedModel(spec, weights_of(network))
