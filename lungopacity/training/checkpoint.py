"""What a training run needs to resume after a crash, in safetensors and JSON, without pickle.

network.safetensors             weights and buffers, as they go into the model folder
learning.safetensors            the weights being trained, where the network is their average
optimizer.safetensors           Adam's moments, named <parameter number>.<moment>
validation_logits.safetensors   this epoch's logits, for calibration
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

from lungopacity.errors import NO_ROOM, ImageError, UserError, last_line
from lungopacity.models import load_weights, weights_of
from lungopacity.storage import S3Store, join_uri, open_store
from lungopacity.storage.s3_errors import may_pass

log = logging.getLogger(__name__)

NETWORK_FILE = "network.safetensors"
LOGITS_FILE = "validation_logits.safetensors"
HISTORY_FILE = "history.json"
_LEARNING_FILE = "learning.safetensors"
_OPTIMIZER_FILE = "optimizer.safetensors"
DOES_NOT_PASS = (*NO_ROOM, errno.EROFS, errno.EACCES, errno.EPERM)
"""Disk errors that last until someone fixes them."""


def write_checkpoint(
    folder: str,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, Any]],
    logits_VK: torch.Tensor,
    averaged: torch.nn.Module | None = None,
) -> None:
    """Writes all files into `folder`. `averaged`: the moving average of `network`, if there is
    one."""
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
def lasting_disk_errors(place: str) -> Iterator[None]:
    """Raises `UserError` where a disk is full or not writable, which a restart does not change."""
    try:
        yield
    except OSError as error:
        if error.errno not in DOES_NOT_PASS:
            raise
        raise UserError(
            f"{place}: a checkpoint cannot be written ({os.strerror(error.errno)}); free space or "
            "give permission, and the same command resumes after its last finished epoch"
        ) from error


def report_epoch(
    row: dict[str, Any], save: Callable[[str], None] | None, place: str, filesystem: FileSystem
) -> None:
    """Reports a history row to Ray Train, with the checkpoint that `save` writes into a folder.

    save: None in ranks that write no checkpoint. place: URI of the folder of the run's checkpoints.
    filesystem: the Arrow filesystem that Ray was given for it. Raises `UserError` where no
    checkpoint can be kept until someone fixes the cause.
    """
    with tempfile.TemporaryDirectory() as folder:
        if save is not None:
            with lasting_disk_errors(f"{folder} on {socket.gethostname()}"):
                save(folder)
        # On disk Ray copies.
        in_s3 = isinstance(open_store(place), S3Store)
        with lasting_disk_errors(place):
            ray.train.report(
                row,
                None if save is None else Checkpoint.from_directory(folder),
                # An upload in the background would be lost if its worker died.
                checkpoint_upload_mode=CheckpointUploadMode.SYNC,
                checkpoint_upload_fn=partial(uploaded, place, filesystem) if in_s3 else None,
            )


def uploaded(place: str, filesystem: FileSystem, local: Checkpoint, name: str) -> Checkpoint:
    """Copies the checkpoint to the folder `name` of `place`, which is in S3, and returns the copy.
    This replaces Ray's upload by Arrow: Arrow 26.0 raises no error where S3 refuses a part, and the
    file is missing.

    Raises `UserError` where a restart would fail again, `ConnectionError` where it may succeed.
    """
    store = open_store(join_uri(place, name))
    try:
        for file in sorted(Path(local.path).iterdir()):
            store.write(file.name, file.read_bytes())
    except UserError as error:
        why = f"a checkpoint cannot be kept: {error}"
        if may_pass(error):
            raise ConnectionError(why) from error
        raise UserError(
            f"{why}; fix this, and the same command resumes after its last finished epoch"
        ) from error
    return Checkpoint(store.uri.removeprefix("s3://"), filesystem)


def read_checkpoint(
    folder: str,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    averaged: torch.nn.Module | None = None,
) -> list[dict[str, Any]]:
    """Loads weights and moments into `network`, `averaged` and `optimizer`, on the devices that
    these are on. Returns the history."""
    root = Path(folder)
    kept = safetensors.torch.load((root / NETWORK_FILE).read_bytes())
    if averaged is None:
        load_weights(network, kept)
    else:
        load_weights(averaged, kept)
        load_weights(network, safetensors.torch.load((root / _LEARNING_FILE).read_bytes()))
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
    """URI of the folder, below the `output` URI, in which Ray Train keeps the run's checkpoints."""
    return join_uri(output, "_training", run)


def rows_of_before(output: str, run: str) -> list[dict[str, Any]]:
    """The history rows of the run's newest checkpoint, which has the longest history; empty where
    the run has none. If only other trainings left checkpoints, a warning says so, because the user
    may have meant to resume one of them."""
    store = open_store(join_uri(output, "_training"))
    histories: list[list[dict[str, Any]]] = [[]]
    others = set()
    for item in store.list():
        if item.key.endswith(f"/{HISTORY_FILE}"):
            owner, _, _ = item.key.partition("/")
            if owner != run:
                others.add(owner)
                continue
            # A file that was being written when the run crashed may be incomplete.
            with contextlib.suppress(ValueError, ImageError):
                histories.append(json.loads(store.read(item.key)))
    rows = max(histories, key=len)
    if others and not rows:
        log.warning(
            "%s holds %d unfinished trainings with other settings, films, splits or weights, or by "
            "another version; this one starts at its first epoch",
            store.uri,
            len(others),
        )
    return rows


def remove_checkpoints(output: str, run: str) -> None:
    """Removes a finished run's checkpoints, and leaves those of other runs of the same output."""
    try:
        work_uri = join_uri(output, "_training")
        filesystem, root = open_store(work_uri).arrow_filesystem()
        filesystem.delete_dir(f"{root}/{run}")
        if not filesystem.get_file_info(FileSelector(root, allow_not_found=True)):
            filesystem.delete_dir(root)
    except (OSError, pa.ArrowException, UserError) as error:
        log.warning(
            "the model is finished; its checkpoints in %s could not be removed (%s): remove them",
            checkpoints_of(output, run),
            last_line(error, with_type=True),
        )


def read_file_of(checkpoint_uri: str, name: str) -> bytes:
    """A file of a checkpoint. Raises `UserError` where it cannot be read."""
    try:
        return open_store(checkpoint_uri).read(name)
    except ImageError as error:
        raise UserError(
            f"{join_uri(checkpoint_uri, name)}: cannot be read ({error.message}); training is "
            "done: run the same command again to finish the model folder"
        ) from error
