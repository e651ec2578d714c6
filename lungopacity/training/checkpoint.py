"""What a training run needs to go on after a crash, in safetensors and JSON: no pickle.

network.safetensors             weights and buffers, as they go into the model folder
learning.safetensors            the weights that go on learning, where others are their average
optimizer.safetensors           Adam's moments, named <parameter number>.<moment>
validation_logits.safetensors   of this epoch, for the calibration
history.json                    one row for each epoch so far; the last is this one
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.train
import safetensors.torch
import torch
from pyarrow.fs import FileSelector, FileSystem
from ray.train import Checkpoint, CheckpointUploadMode

from lungopacity.errors import ImageError, UserError, last_line
from lungopacity.models import weights_of
from lungopacity.storage import S3Store, join_uri, open_store
from lungopacity.storage.s3_errors import may_pass
from lungopacity.storage.scratch import NO_ROOM

log = logging.getLogger(__name__)

NETWORK_FILE = "network.safetensors"
LOGITS_FILE = "validation_logits.safetensors"
HISTORY_FILE = "history.json"
_LEARNING_FILE = "learning.safetensors"
_OPTIMIZER_FILE = "optimizer.safetensors"
_DOES_NOT_PASS = (*NO_ROOM, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of a disk that stay until someone mends them."""


def write_checkpoint(
    folder: str,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, Any]],
    logits_VK: torch.Tensor,
    averaged: torch.nn.Module | None = None,
) -> None:
    """Write all files into `folder`. `averaged`: what is kept instead of `network`."""
    root = Path(folder)
    moments = {
        f"{number}.{name}": tensor.detach().cpu().contiguous()
        for number, tensors in optimizer.state_dict()["state"].items()
        for name, tensor in tensors.items()
    }
    (root / NETWORK_FILE).write_bytes(weights_of(averaged or network))
    if averaged is not None:
        (root / _LEARNING_FILE).write_bytes(weights_of(network))
    (root / _OPTIMIZER_FILE).write_bytes(safetensors.torch.save(moments))
    (root / LOGITS_FILE).write_bytes(safetensors.torch.save({"logits_VK": logits_VK}))
    (root / HISTORY_FILE).write_text(json.dumps(history), encoding="utf-8")


@contextlib.contextmanager
def told_of_no_room(place: str) -> Iterator[None]:
    """Raises `UserError` where a disk is full or may not be written to, which a restart meets
    again."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DOES_NOT_PASS:
            raise
        raise UserError(
            f"{place}: a checkpoint cannot be written ({os.strerror(error.errno)}); free space or "
            "give permission, and the same command goes on after its last finished epoch"
        ) from error


def report_epoch(
    row: dict[str, Any], save: Callable[[str], None] | None, place: str, filesystem: FileSystem
) -> None:
    """Report a history row to Ray Train, with the checkpoint that `save` writes into a folder.

    place: URI of the folder that keeps checkpoints; filesystem: Arrow's, as Ray has it. Raises
    `UserError` where no checkpoint can be kept until someone mends it.
    """
    with tempfile.TemporaryDirectory() as folder:
        if save is not None:
            with told_of_no_room(f"{folder} on {socket.gethostname()}"):
                save(folder)
        # On disk Ray copies, which first looks whether all nodes share that disk.
        in_s3 = isinstance(open_store(place), S3Store)
        with told_of_no_room(place):
            ray.train.report(
                row,
                None if save is None else Checkpoint.from_directory(folder),
                # Uploaded in the background, it is lost with the worker that made it.
                checkpoint_upload_mode=CheckpointUploadMode.SYNC,
                checkpoint_upload_fn=partial(uploaded, place, filesystem) if in_s3 else None,
            )


def uploaded(place: str, filesystem: FileSystem, local: Checkpoint, name: str) -> Checkpoint:
    """Its copy in the folder `name` of `place`, which is in S3. Ray would have Arrow make it: of a
    part that S3 refuses, Arrow 26.0 tells nobody, and the file is not there.

    Raises `UserError` where a restart meets the same, `ConnectionError` where it may not.
    """
    store = open_store(join_uri(place, name))
    try:
        for file in sorted(Path(local.path).iterdir()):
            store.write(file.name, file.read_bytes())
    except UserError as error:
        told = f"a checkpoint cannot be kept: {error}"
        if may_pass(error):
            raise ConnectionError(told) from error
        raise UserError(
            f"{told}; mend it, and the same command goes on after its last finished epoch"
        ) from error
    return Checkpoint(store.uri.removeprefix("s3://"), filesystem)


def read_checkpoint(
    folder: str,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    averaged: torch.nn.Module | None = None,
) -> list[dict[str, Any]]:
    """Load weights and moments into `network`, `averaged` and `optimizer`, on whatever device they
    are.

    Returns the history.
    """
    root = Path(folder)
    kept = safetensors.torch.load((root / NETWORK_FILE).read_bytes())
    if averaged is None:
        network.load_state_dict(kept)
    else:
        averaged.load_state_dict(kept)
        network.load_state_dict(safetensors.torch.load((root / _LEARNING_FILE).read_bytes()))
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in safetensors.torch.load((root / _OPTIMIZER_FILE).read_bytes()).items():
        number, _, moment = name.partition(".")
        moments.setdefault(int(number), {})[moment] = tensor
    optimizer.load_state_dict(
        {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    history: list[dict[str, Any]] = json.loads((root / HISTORY_FILE).read_text(encoding="utf-8"))
    return history


def checkpoints_of(output: str, run: str) -> str:
    """URI of the folder in which Ray Train keeps those of the run, below the `output` URI."""
    return join_uri(output, "_training", run)


def rows_of_before(output: str, run: str) -> list[dict[str, Any]]:
    """Of the newest checkpoint, that of the longest history; none where there is none, with a
    warning where other trainings left some: who meant to go on with one of them must know."""
    store = open_store(join_uri(output, "_training"))
    histories: list[list[dict[str, Any]]] = [[]]
    others = set()
    for item in store.list():
        if item.key.endswith(f"/{HISTORY_FILE}"):
            of, _, _ = item.key.partition("/")
            if of != run:
                others.add(of)
                continue
            # What was being written when the run crashed may be half there.
            with contextlib.suppress(ValueError, ImageError):
                histories.append(json.loads(store.read(item.key)))
    rows = max(histories, key=len)
    if others and not rows:
        log.warning(
            "%s holds %d unfinished trainings of other settings, films, splits or weights, or of "
            "another lungopacity; this one begins at its first epoch",
            store.uri,
            len(others),
        )
    return rows


def remove_checkpoints(output: str, run: str) -> None:
    """Remove a finished run's checkpoints, and none of other commands of the same output."""
    try:
        work_uri = join_uri(output, "_training")
        filesystem, root = open_store(work_uri).arrow_filesystem()
        filesystem.delete_dir(f"{root}/{run}")
        if not filesystem.get_file_info(FileSelector(root, allow_not_found=True)):
            filesystem.delete_dir(root)
    except (OSError, pa.ArrowException, UserError) as error:
        log.warning(
            "the model is finished; its checkpoints in %s could not be removed (%s), remove them",
            checkpoints_of(output, run),
            last_line(error, with_type=True),
        )


def read_file_of(checkpoint_uri: str, name: str) -> bytes:
    """A file of a checkpoint. Raises `UserError` where it cannot be read."""
    try:
        return open_store(checkpoint_uri).read(name)
    except ImageError as error:
        raise UserError(
            f"{join_uri(checkpoint_uri, name)}: cannot be read ({error.message}); the training is "
            "done, run the same command again to finish the model folder"
        ) from error
