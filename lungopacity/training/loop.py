"""The training loop that Ray Train runs in every worker.

All random numbers are seeded by (seed, epoch, rank) and the learning rate depends only on the step.
An epoch therefore depends only on the weights and optimizer moments before it, and a run resumed
from a checkpoint continues as if it had never stopped. With three or more workers the last digits
may differ: DDP reorders the gradients after its first step, which changes the order of their
summation. On GPUs a run is as reproducible as torch's layers: the backward passes of adaptive
pooling (alexnet, torchvision's VGG) and of attention may sum in any order.

Tensor names carry their shape: N all films, V validation films, B films of one worker's batch,
H height, W width, K classes.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.train import Checkpoint
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from lungopacity.models import build_network, load_weights
from lungopacity.models.normalise import normalise
from lungopacity.models.scorer import exact_float32
from lungopacity.runtime import check_same_code, cpus_here, leave_no_core
from lungopacity.storage import open_store
from lungopacity.storage.probe import check_node
from lungopacity.training.augment import augment
from lungopacity.training.checkpoint import read_checkpoint, report_epoch, write_checkpoint
from lungopacity.training.optimizer import learning_rate_at, optimizer_of
from lungopacity.training.precision import depthwise_in_float32, use_bfloat16
from lungopacity.training.settings import TrainingSettings

_EVALUATION_BATCH = 64


def ddp_options() -> dict[str, Any]:
    """Options for torch's DDP."""
    known = inspect.signature(DistributedDataParallel).parameters
    # torch 2.15 renamed broadcast_buffers.
    buffers = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in known)
    # By default each step broadcasts the running statistics of batch normalisation, which takes a
    # fifteenth of its time on two cores. Only validation reads them, and broadcasts rank 0's.
    return {buffers: False, "gradient_as_bucket_view": True}


@dataclass(frozen=True)
class Films:
    """The labelled films of training and validation, which workers share in Ray's object store."""

    pixels_NHW: npt.NDArray[np.uint8]
    labels_N: npt.NDArray[np.int64]
    train: npt.NDArray[np.int64]
    """Indices of the training films."""
    validation: npt.NDArray[np.int64]
    """Indices of the validation films."""
    classes: int


@dataclass(frozen=True)
class Worker:
    """This process, as one of those that train together."""

    settings: TrainingSettings
    films: Films
    rank: int
    workers: int
    device: torch.device

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replaces the tensor by its sum over the workers."""
        if self.workers > 1:
            torch.distributed.all_reduce(tensor)

    def together(self, network: torch.nn.Module) -> torch.nn.Module:
        """The network, wrapped so that its gradients are averaged over the workers."""
        if self.workers == 1:
            return network
        prepared: torch.nn.Module = ray.train.torch.prepare_model(
            network, parallel_strategy_kwargs=ddp_options()
        )
        return prepared

    def batches(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """Indices of this rank's films in the epoch, by batch. Every rank has equally many batches
        of the same sizes.

        As in torch's DistributedSampler, films from the start of the order are repeated until it
        divides by the workers. Unlike there, batches are of even size and hold at least two films,
        because batch normalisation cannot take one. The number of steps does not depend on the
        number of workers, which may change during a run: the learning rate and the moving average
        depend on the step.
        """
        order = self._order(np.random.default_rng([self.settings.seed, epoch]))
        steps = math.ceil(len(order) / self.settings.batch_size)
        share = max(math.ceil(len(order) / self.workers), 2 * steps)
        mine = np.resize(order, share * self.workers)[self.rank :: self.workers]
        return np.array_split(mine, steps)

    def _order(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """The training films in a random order. With class_balance `sampling`, equally many of each
        class: films of small classes are repeated, and some of large ones left out."""
        train = self.films.train
        if self.settings.class_balance != "sampling":
            return rng.permutation(train)
        labels = self.films.labels_N[train]
        share = math.ceil(len(train) / self.films.classes)
        each = [
            np.resize(rng.permutation(train[labels == label]), share)
            for label in range(self.films.classes)
        ]
        return rng.permutation(np.concatenate(each))

    def class_weights(self) -> torch.Tensor | None:
        """The weight of a film of each class, (classes,) float32; their mean over films is 1."""
        if self.settings.class_balance != "weights":
            return None
        counts = np.bincount(self.films.labels_N[self.films.train], minlength=self.films.classes)
        weights = counts.sum() / (self.films.classes * counts)
        return torch.from_numpy(weights.astype(np.float32)).to(self.device)


def train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """Runs one worker.

    config: `settings` (`TrainingSettings`); `films`, a reference to `Films`; `first`, a reference
    to the first weights by name, or None; `code`, the driver's `code_digest`; `place` and
    `filesystem`, as for `report_epoch`. Reports a history row and a checkpoint after each epoch.
    Returns `diverged_in_epoch`: the epoch whose loss was not finite, or None. Raises `UserError`
    where no checkpoint can be kept, or this node's lungopacity is not the driver's.
    """
    check_same_code(config["code"])
    leave_no_core()
    # Ray, which made the folder on the driver's node, looks only after an epoch, again and again.
    check_node(open_store(config["place"]), "a training worker runs")
    context = ray.train.get_context()
    settings: TrainingSettings = config["settings"]
    worker = Worker(
        settings=settings,
        films=ray.get(config["films"]),
        rank=context.get_world_rank(),
        workers=context.get_world_size(),
        # The CPU for a worker without a reserved GPU, even where its node has GPUs.
        device=ray.train.torch.get_device(),
    )
    if worker.device.type == "cpu":
        # Ray would allow one thread, for the one CPU reserved; training has the node to itself.
        torch.set_num_threads(max(1, cpus_here() // context.get_local_world_size()))

    def report(row: dict[str, Any], _: torch.Tensor, save: Callable[[str], None]) -> None:
        mine = save if worker.rank == 0 else None
        report_epoch(row, mine, config["place"], config["filesystem"])

    first = None if config["first"] is None else ray.get(config["first"])
    return {"diverged_in_epoch": learn(worker, first, ray.train.get_checkpoint(), report)}


Report = Callable[[dict[str, Any], torch.Tensor, Callable[[str], None]], None]
"""Called after an epoch with its history row, the validation logits (V, K), float32 on the CPU, and
a function that writes a checkpoint into a folder."""


def learn(
    worker: Worker,
    first: dict[str, torch.Tensor] | None,
    checkpoint: Checkpoint | None,
    report: Report,
) -> int | None:
    """Trains all epochs, or those after the checkpoint, and calls `report` after each.

    `first`: first weights by name. Returns the epoch whose loss was not finite, or None.
    """
    settings = worker.settings
    torch.backends.cudnn.deterministic = True
    # Operating points chosen on validation logits are applied to the scores of `Scorer`, which
    # computes as exactly.
    exact_float32()
    # DDP warns that a 3 x 3 kernel of one channel has two memory layouts. Both are correct.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")

    torch.manual_seed(_seed(settings.seed))
    network = build_network(settings.model, worker.films.classes, settings.model_settings)
    if first is not None:
        load_weights(network, first, strict=False)
    network = network.to(worker.device).to(memory_format=torch.channels_last)
    if worker.device.type == "cpu":
        depthwise_in_float32(network)
    # The network that is validated and kept: this one, or the moving average of its weights.
    kept = copy.deepcopy(network) if settings.ema_decay else network
    averaged = kept if settings.ema_decay else None
    optimizer = optimizer_of(network, settings)
    history: list[dict[str, Any]] = []
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            history = read_checkpoint(folder, network, optimizer, averaged)

    labels_V = torch.from_numpy(worker.films.labels_N[worker.films.validation])
    distributed: torch.nn.Module | None = None
    # The seconds of an epoch include the report of the one before it.
    started = time.monotonic()
    for epoch in range(len(history) + 1, settings.epochs + 1):
        if _patience_spent(history, settings.patience):
            break
        if distributed is None or epoch == settings.frozen_epochs + 1:
            # DDP reads which weights are trainable only when it is built.
            _freeze(network, epoch <= settings.frozen_epochs)
            distributed = worker.together(network)
        trained = _train_epoch(worker, distributed, optimizer, epoch, averaged)
        logits_VK = _validation_logits(worker, kept)
        validation_loss = functional.cross_entropy(logits_VK, labels_V).item()
        if not math.isfinite(trained["train_loss"] + validation_loss):
            return epoch
        row = {
            "epoch": epoch,
            **trained,
            "validation_loss": validation_loss,
            "validation_accuracy": (logits_VK.argmax(1) == labels_V).double().mean().item(),
            "seconds": time.monotonic() - started,
            "workers": worker.workers,
        }
        started = time.monotonic()
        history.append(row)

        def save(folder: str, logits_VK: torch.Tensor = logits_VK) -> None:
            write_checkpoint(folder, network, optimizer, history, logits_VK, averaged)

        report(row, logits_VK, save)
    return None


def _freeze(network: torch.nn.Module, frozen: bool) -> None:
    """Freezes or unfreezes everything but the head."""
    for name, weight in network.named_parameters():
        weight.requires_grad_(not frozen or name.startswith("head."))


def _set_training(distributed: torch.nn.Module, network: torch.nn.Module, frozen: bool) -> None:
    """Puts the network into training mode, including the dropout before the last layer. Frozen
    layers keep their running statistics and skip no residual branches."""
    distributed.train()
    if not frozen:
        return
    for name, part in network.named_modules():
        # By class name, so as not to import the libraries that define them.
        skips = type(part).__name__ in ("DropPath", "StochasticDepth")
        if (isinstance(part, _NormBase) or skips) and name.partition(".")[0] != "head":
            part.eval()


def _train_epoch(
    worker: Worker,
    distributed: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    averaged: torch.nn.Module | None,
) -> dict[str, float]:
    """Trains one epoch. Returns its part of the history row."""
    settings, films, device = worker.settings, worker.films, worker.device
    started = time.monotonic()
    torch.manual_seed(_seed(settings.seed, epoch, worker.rank))
    amounts = torch.Generator().manual_seed(_seed(settings.seed, epoch, worker.rank, 1))
    shares = np.random.default_rng([settings.seed, epoch, worker.rank, 2])
    autocast = torch.autocast(
        device.type, torch.bfloat16, enabled=use_bfloat16(settings.precision, device)
    )
    batches = worker.batches(epoch)
    sums = torch.zeros(2, device=device)
    weights_K = worker.class_weights()
    network = getattr(distributed, "module", distributed)
    _set_training(distributed, network, epoch <= settings.frozen_epochs)
    for number, index_B in enumerate(batches, start=1):
        # At the middle of the step, so that the rate is above 0 in the first and the last step.
        progress = (epoch - 1 + (number - 0.5) / len(batches)) / settings.epochs
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(progress, settings)
        pixels_BHW = torch.from_numpy(films.pixels_NHW[index_B]).to(device)
        labels_B = torch.from_numpy(films.labels_N[index_B]).to(device)
        pixels_BHW = augment(pixels_BHW, settings.augmentation, amounts)
        x_B1HW = normalise(pixels_BHW, settings.preprocessing)
        share = 1.0
        if settings.mixup_alpha:
            # The order is random, so flipping it pairs each film with a random other one.
            share = float(shares.beta(settings.mixup_alpha, settings.mixup_alpha))
            x_B1HW = torch.lerp(x_B1HW.flip(0), x_B1HW, share)
        with autocast:
            logits_BK = distributed(x_B1HW)
        logits_BK = logits_BK.float()

        loss = loss_of(logits_BK, labels_B, share, weights_K, settings.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if settings.gradient_clip:
            torch.nn.utils.clip_grad_norm_(network.parameters(), settings.gradient_clip)
        optimizer.step()
        if averaged is not None:
            step = (epoch - 1) * len(batches) + number
            _average(averaged, network, settings.ema_decay, step)
        called_B = logits_BK.argmax(1)
        own, other = ((called_B == of_B).float().sum() for of_B in (labels_B, labels_B.flip(0)))
        # A blend counts as correct by each film's share in it, as in the loss.
        right = torch.lerp(other, own, share)
        sums += torch.stack([loss.detach() * len(labels_B), right])
    worker.add_up(sums)
    seen = worker.workers * sum(map(len, batches))
    return {
        "train_loss": sums[0].item() / seen,
        "train_accuracy": sums[1].item() / seen,
        "learning_rate": optimizer.param_groups[0]["lr"],
        "images_per_s": seen / (time.monotonic() - started),
    }


def loss_of(
    logits_BK: torch.Tensor,
    labels_B: torch.Tensor,
    share: float,
    weights_K: torch.Tensor | None,
    smoothing: float,
) -> torch.Tensor:
    """The mean loss over the films of a batch.

    share: the film's own share where it is blended with the one at the opposite position of the
    batch. weights_K: weight of a film of each class. The weights of `cross_entropy` are not used:
    they also weight the smoothing, and are normalised over a rank's batch, so that the loss would
    depend on the number of workers.
    """

    def mean_of(labels_B: torch.Tensor) -> torch.Tensor:
        losses_B = functional.cross_entropy(
            logits_BK, labels_B, reduction="none", label_smoothing=smoothing
        )
        return (losses_B if weights_K is None else weights_K[labels_B] * losses_B).mean()

    own = mean_of(labels_B)
    return own if share == 1.0 else torch.lerp(mean_of(labels_B.flip(0)), own, share)


@torch.no_grad()
def _average(averaged: torch.nn.Module, network: torch.nn.Module, decay: float, step: int) -> None:
    """Moves the average towards the network. In the first steps it follows fast, as in TensorFlow's
    ExponentialMovingAverage, so that the first weights soon lose their influence."""
    decay = min(decay, (1 + step) / (10 + step))
    pairs = zip(averaged.state_dict().values(), network.state_dict().values(), strict=True)
    for mean, latest in pairs:
        if mean.is_floating_point():
            mean.lerp_(latest, 1 - decay)
        else:
            mean.copy_(latest)


def _validation_logits(worker: Worker, network: torch.nn.Module) -> torch.Tensor:
    """Logits (validation films, classes), float32 on the CPU, the same in every rank.

    Each rank computes its share and leaves the others 0; the sum over ranks has every film once.
    """
    films = worker.films
    if worker.workers > 1:
        # Each rank's batch norm has seen other films; rank 0's statistics go into the model.
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)
    network.eval()
    logits_VK = torch.zeros(len(films.validation), films.classes, device=worker.device)
    mine = np.arange(worker.rank, len(films.validation), worker.workers)
    with torch.no_grad():
        for start in range(0, len(mine), _EVALUATION_BATCH):
            rows = mine[start : start + _EVALUATION_BATCH]
            pixels_BHW = torch.from_numpy(films.pixels_NHW[films.validation[rows]])
            # In float32 whatever the precision of training, as `Scorer` does.
            x_B1HW = normalise(pixels_BHW.to(worker.device), worker.settings.preprocessing)
            logits_VK[torch.from_numpy(rows)] = network(x_B1HW).float()
    worker.add_up(logits_VK)
    return logits_VK.cpu()


def _patience_spent(history: list[dict[str, Any]], patience: int) -> bool:
    losses = [row["validation_loss"] for row in history]
    return bool(patience and losses) and len(losses) - 1 - int(np.argmin(losses)) >= patience


def _seed(*numbers: int) -> int:
    """An independent seed for each tuple of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
