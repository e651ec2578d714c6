"""The parts of the training loop, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from lungopacity.models import build_network
from lungopacity.training import loop
from lungopacity.training.checkpoint import NETWORK_FILE
from lungopacity.training.loop import (
    Films,
    Worker,
    _patience_spent,
    _set_training,
    _train_epoch,
    _validation_logits,
    learn,
    loss_of,
)
from lungopacity.training.optimizer import learning_rate_at
from lungopacity.training.settings import AugmentationSettings, TrainingSettings

SMOOTHING = 0.1
SMALL = {"channels": (2,), "convolutions": (1,)}
"""A network for films of 4 x 4 pixels."""

GREY_NHW = np.full((100, 4, 4), 100, np.uint8)


def worker(settings: TrainingSettings, rank: int = 0, workers: int = 1, rare: int = 5) -> Worker:
    """95 films of class 0 and `rare` films of class 1, each with a grey of its own."""
    labels_N = np.array([0] * 95 + [1] * rare)
    pixels_NHW = np.repeat(np.arange(len(labels_N), dtype=np.uint8), 16).reshape(-1, 4, 4)
    train = np.arange(len(labels_N))
    films = Films(pixels_NHW, labels_N, train, train[:0], classes=2)
    return Worker(settings, films, rank, workers, torch.device("cpu"))


def test_weights_count_a_film_by_the_inverse_of_its_class() -> None:
    weights_K = worker(TrainingSettings(class_balance="weights")).class_weights()
    assert weights_K is not None
    assert weights_K.tolist() == pytest.approx([100 / 190, 10.0])
    assert worker(TrainingSettings()).class_weights() is None


def test_sampling_draws_equally_many_of_each_class_over_all_workers() -> None:
    settings = TrainingSettings(class_balance="sampling", batch_size=12)
    for workers in (1, 2, 3):
        drawn = [
            index
            for rank in range(workers)
            for batch in worker(settings, rank, workers).batches(epoch=3)
            for index in batch
        ]
        counts = np.bincount(worker(settings).films.labels_N[drawn])
        assert counts.tolist() == pytest.approx([50, 50], abs=workers)


def expected(
    logits_BK: torch.Tensor, labels_B: torch.Tensor, weights_K: torch.Tensor
) -> torch.Tensor:
    """The loss as the settings describe it, computed film by film."""
    targets_BK = (1 - SMOOTHING) * functional.one_hot(labels_B, 2) + SMOOTHING / 2
    losses_B = -(targets_BK * logits_BK.log_softmax(1)).sum(1)
    return (weights_K[labels_B] * losses_B).mean()


def test_a_film_counts_its_classs_weight_whatever_else_is_in_its_batch() -> None:
    weights_K = worker(TrainingSettings(class_balance="weights")).class_weights()
    assert weights_K is not None
    labels_B = torch.from_numpy(worker(TrainingSettings()).films.labels_N)
    logits_BK = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    whole = loss_of(logits_BK, labels_B, 1.0, weights_K, SMOOTHING)
    assert whole.item() == pytest.approx(expected(logits_BK, labels_B, weights_K).item())
    # As in DDP's ranks: batches of the same size, most of which have no rare film.
    parts = [
        loss_of(
            logits_BK[start : start + 4], labels_B[start : start + 4], 1.0, weights_K, SMOOTHING
        )
        for start in range(0, 100, 4)
    ]
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item())


def test_label_smoothing_takes_the_same_share_from_every_class() -> None:
    weights_K = worker(TrainingSettings(class_balance="weights")).class_weights()
    assert weights_K is not None
    for label, given in ((0, [0.95, 0.05]), (1, [0.05, 0.95])):
        logits_1K = torch.zeros(1, 2, requires_grad=True)
        loss_of(logits_1K, torch.tensor([label]), 1.0, weights_K, SMOOTHING).backward()
        assert logits_1K.grad is not None
        targets_K = 0.5 - logits_1K.grad[0] / weights_K[label]
        assert targets_K.tolist() == pytest.approx(given)


class Recorder(nn.Module):
    """Records its inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 2)
        self.shown: list[torch.Tensor] = []
        self.said: list[torch.Tensor] = []

    def forward(self, x_B1HW: torch.Tensor) -> torch.Tensor:
        self.shown.append(x_B1HW[:, 0, 0, 0])
        logits_BK: torch.Tensor = self.head(x_B1HW.mean(dim=(2, 3)))
        self.said.append(logits_BK.detach())
        return logits_BK


def test_mixup_blends_films_and_labels_by_the_same_share() -> None:
    still = AugmentationSettings(0, 0, 0, 0, 0, 0, 0)
    settings = TrainingSettings(
        augmentation=still, mixup_alpha=1.0, class_balance="weights", label_smoothing=SMOOTHING,
        batch_size=140, precision="float32",
    )  # fmt: skip
    own = worker(settings, rare=45)
    network = Recorder()
    # It classifies the brighter half of the films as opacities.
    network.load_state_dict(
        {"head.weight": torch.tensor([[-1.0], [1.0]]), "head.bias": torch.tensor([0.0, 1.8])}
    )
    row = _train_epoch(own, network, torch.optim.SGD(network.parameters()), 1, None)
    (index_B,), (shown_B,), (logits_BK,) = own.batches(1), network.shown, network.said
    x_B = (torch.from_numpy(own.films.pixels_NHW[index_B][:, 0, 0]) / 255 - 0.5) / 0.25
    share = ((shown_B - x_B.flip(0)) / (x_B - x_B.flip(0)))[0].item()
    assert 0.01 < share < 0.99
    torch.testing.assert_close(shown_B, share * x_B + (1 - share) * x_B.flip(0))
    labels_B = torch.from_numpy(own.films.labels_N[index_B])
    weights_K = own.class_weights()
    assert weights_K is not None
    loss = share * expected(logits_BK, labels_B, weights_K)
    loss += (1 - share) * expected(logits_BK, labels_B.flip(0), weights_K)
    assert row["train_loss"] == pytest.approx(loss.item(), rel=1e-4)
    called_B = logits_BK.argmax(dim=1)
    right = share * (called_B == labels_B).double().mean()
    right += (1 - share) * (called_B == labels_B.flip(0)).double().mean()
    assert row["train_accuracy"] == pytest.approx(right.item(), rel=1e-4)
    assert row["train_accuracy"] != pytest.approx((called_B == labels_B).double().mean().item())


@pytest.mark.parametrize("name", ["cov-net", "efficientnet-lite0", "classical-cnn"])
def test_while_the_rest_is_frozen_the_last_layer_learns_with_its_dropout(name: str) -> None:
    with torch.device("meta"):
        drop_path = {"drop_path": 0.2} if name.startswith("eff") else {}
        network = build_network(name, 2, {"dropout": 0.45, **drop_path})
    for frozen in (True, False):
        _set_training(network, network, frozen)
        parts = list(network.modules())
        assert all(
            part.training for part in parts if isinstance(part, nn.Dropout) and part.p == 0.45
        )
        assert {part.training for part in parts if isinstance(part, nn.BatchNorm2d)} == {not frozen}
        paths = {part.training for part in parts if type(part).__name__ == "DropPath"}
        assert paths == ({not frozen} if drop_path else set())


@pytest.mark.parametrize(
    ("losses", "patience", "spent"),
    [
        ([], 1, False),
        ([3, 2, 1], 1, False),
        ([3, 1, 2], 1, True),
        ([3, 1, 2], 2, False),
        ([3, 1, 2, 2], 2, True),
        ([3, 1, 2, 1], 2, True),  # an equal loss is not lower
        ([3, 1, 2, 0.9], 2, False),
        ([1, 2, 3, 4], 0, False),
    ],
)
def test_patience_is_spent_after_so_many_epochs_without_a_lower_loss(
    losses: list[float], patience: int, spent: bool
) -> None:
    history = [{"validation_loss": loss} for loss in losses]
    assert _patience_spent(history, patience) is spent


def test_validation_is_as_exact_as_screening() -> None:
    """Otherwise GPUs would round to 10 bits, and thresholds would be fitted to other scores."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    exact: list[bool] = []
    own = worker(TrainingSettings(epochs=1, batch_size=50, model_settings=SMALL), rare=5)
    own = replace(own, films=replace(own.films, validation=own.films.train))
    try:
        learn(own, None, None, lambda *_: exact.append(not torch.backends.cudnn.allow_tf32))
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert exact == [True]


def test_gradients_are_scaled_down_to_the_given_norm() -> None:
    moved = {}
    for clip in (0.0, 1e9, 0.01):
        torch.manual_seed(0)
        network = Recorder()
        before = [weight.detach().clone() for weight in network.parameters()]
        settings = TrainingSettings(
            batch_size=100, gradient_clip=clip, learning_rate=1.0, warmup_fraction=0.0, epochs=1000
        )
        optimizer = torch.optim.SGD(network.parameters())
        _train_epoch(worker(settings), network, optimizer, 1, None)
        pairs = zip(network.parameters(), before, strict=True)
        moved[clip] = sum((now - then).square().sum() for now, then in pairs) ** 0.5
    # A step of gradient descent moves by the norm of its gradient.
    assert moved[0.01].item() == pytest.approx(0.01, rel=1e-3)
    assert moved[1e9] == moved[0.0] > 0.05


def test_every_epoch_draws_its_own_order_of_all_films() -> None:
    own = worker(TrainingSettings(batch_size=20))
    first, second = (np.concatenate(own.batches(epoch)) for epoch in (1, 2))
    assert sorted(first) == sorted(second) == list(range(100))
    assert len({tuple(order) for order in (first, second, range(100))}) == 3


def test_where_classes_are_balanced_every_batch_has_both() -> None:
    own = worker(TrainingSettings(class_balance="sampling", batch_size=20))
    assert all(set(own.films.labels_N[batch]) == {0, 1} for batch in own.batches(epoch=1))


class Watched(torch.optim.SGD):
    """Records the learning rate and the bias's gradient of each step."""

    def __init__(self, network: Recorder) -> None:
        super().__init__(network.parameters())
        self.bias = network.head.bias
        self.rates: list[float] = []
        self.gradients: list[torch.Tensor] = []

    def step(self, closure: Any = None) -> Any:
        assert self.bias.grad is not None
        self.rates.append(self.param_groups[0]["lr"])
        self.gradients.append(self.bias.grad.clone())
        return super().step(closure)


def test_each_step_uses_its_own_batch_and_the_rate_at_the_middle_of_its_interval() -> None:
    settings = TrainingSettings(
        batch_size=25, epochs=4, label_smoothing=0.0, learning_rate=0.4, precision="float32"
    )
    own, network = worker(settings), Recorder()
    optimizer = Watched(network)
    _train_epoch(own, network, optimizer, 2, None)
    middles = [(1 + part) / 4 for part in (0.125, 0.375, 0.625, 0.875)]
    assert optimizer.rates == [learning_rate_at(middle, settings) for middle in middles]
    batches = zip(own.batches(2), network.said, optimizer.gradients, strict=True)
    for index_B, logits_BK, gradient_K in batches:
        targets_BK = functional.one_hot(torch.from_numpy(own.films.labels_N[index_B]), 2)
        expected_K = (logits_BK.softmax(1) - targets_BK).mean(0)
        torch.testing.assert_close(gradient_K, expected_K)


def test_every_epoch_changes_the_films_differently() -> None:
    brighter = AugmentationSettings(0, 0, 0, gain=0.5, gamma=0, flip_probability=0)
    own = worker(TrainingSettings(augmentation=brighter, batch_size=100))
    gains = []
    for epoch in (1, 2):
        network = Recorder()
        _train_epoch(own, network, torch.optim.SGD(network.parameters()), epoch, None)
        (index_B,), (shown_B,) = own.batches(epoch), network.shown
        black = index_B == 0
        greys_B = own.films.pixels_NHW[index_B][:, 0, 0]
        gains.append(((shown_B.numpy() * 0.25 + 0.5) * 255)[~black] / greys_B[~black])
        assert gains[-1].min() < 0.9 < 1.1 < gains[-1].max()
    assert not np.allclose(gains[0][:50], gains[1][:50], atol=0.02)


class Drawing(Recorder):
    """Together with random numbers of torch, as dropout draws them."""

    def forward(self, x_B1HW: torch.Tensor) -> torch.Tensor:
        self.drawn = torch.rand(1).item()
        return super().forward(x_B1HW)


def test_each_seed_epoch_and_rank_draws_its_own_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers with the same draws would see only half of the changes."""
    monkeypatch.setattr(Worker, "add_up", lambda *_: None)  # there is no other worker
    brighter = AugmentationSettings(0, 0, 0, gain=0.5, gamma=0, flip_probability=0)
    settings = TrainingSettings(augmentation=brighter, batch_size=200)
    gains, drawn, shares, orders = set(), set(), set(), set()
    for seed, epoch, rank in ((0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)):
        own = worker(replace(settings, seed=seed), rank, workers=2)
        orders.add(tuple(np.concatenate(own.batches(epoch))))
        own = replace(own, films=replace(own.films, pixels_NHW=GREY_NHW))
        shown = {}
        for alpha in (0.0, 1.0):
            # All films are equal, so that the results show what was drawn, and not their order.
            own = replace(own, settings=replace(own.settings, mixup_alpha=alpha))
            network = Drawing()
            _train_epoch(own, network, torch.optim.SGD(network.parameters()), epoch, None)
            drawn.add(network.drawn)
            shown[alpha] = network.shown[0]
        gains.add(tuple(shown[0.0].tolist()))
        first, last = shown[0.0][0], shown[0.0][-1]
        shares.add(round(((shown[1.0][0] - last) / (first - last)).item(), 3))
    assert [len(found) for found in (gains, drawn, shares, orders)] == [4, 4, 4, 4]


@pytest.mark.parametrize(("decay", "kept"), [(0.995, 3 / 12), (0.2, 0.2)])
def test_the_average_keeps_its_share_of_what_it_was(decay: float, kept: float) -> None:
    own = worker(TrainingSettings(batch_size=100, ema_decay=decay, learning_rate=1.0))
    network, averaged = Recorder(), Recorder()
    before_K = averaged.head.bias.detach().clone()
    # The second step overall: the first epoch had one, too.
    _train_epoch(own, network, torch.optim.SGD(network.parameters()), 2, averaged)
    now_K = network.head.bias.detach()
    assert not torch.allclose(before_K, now_K)
    torch.testing.assert_close(averaged.head.bias.detach(), kept * before_K + (1 - kept) * now_K)


def test_validation_scores_each_film_as_screening_does() -> None:
    network = build_network("classical-cnn", 2, {**SMALL, "dropout": 0.5})
    own = worker(TrainingSettings())
    validation = np.random.default_rng(0).permutation(100)[:70]
    own = replace(own, films=replace(own.films, validation=validation))
    network.train()
    logits_VK = _validation_logits(own, network)
    network.eval()
    x_V1HW = (torch.from_numpy(own.films.pixels_NHW[validation])[:, None] / 255 - 0.5) / 0.25
    with torch.no_grad():
        torch.testing.assert_close(logits_VK, network(x_V1HW))


def trained(settings: TrainingSettings, first: dict[str, torch.Tensor] | None, folder: Path) -> Any:
    """Weights by name after each epoch."""
    own = worker(replace(settings, batch_size=50, model_settings=SMALL), rare=5)
    own = replace(own, films=replace(own.films, validation=own.films.train))
    after = []

    def report(row: dict[str, Any], logits_VK: torch.Tensor, save: Callable[[str], None]) -> None:
        right_V = logits_VK.argmax(1).numpy() == own.films.labels_N
        assert row["validation_accuracy"] == pytest.approx(right_V.mean())
        save(str(folder))
        after.append(safetensors.torch.load((folder / NETWORK_FILE).read_bytes()))

    assert learn(own, first, None, report) is None
    return after


def test_frozen_epochs_leave_the_first_weights_as_they_are_but_for_the_last_layer(
    tmp_path: Path,
) -> None:
    first = build_network("classical-cnn", 2, SMALL).state_dict()
    frozen, free = trained(TrainingSettings(epochs=2, frozen_epochs=1), first, tmp_path)
    for name, weight in first.items():
        assert torch.equal(frozen[name], weight) is not name.startswith("head."), name
        assert not torch.equal(free[name], frozen[name]), name


def test_each_seed_has_first_weights_of_its_own(tmp_path: Path) -> None:
    """Frozen ones stay what they were."""
    settings = TrainingSettings(epochs=1, frozen_epochs=1)
    (first,), (again,), (other,) = (
        trained(replace(settings, seed=seed), None, tmp_path) for seed in (0, 0, 1)
    )
    (name,) = (name for name, weight in first.items() if weight.ndim == 4)
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_the_average_is_kept_beside_the_weights_that_learn(tmp_path: Path) -> None:
    (kept,) = trained(TrainingSettings(epochs=1, ema_decay=0.9), None, tmp_path)
    learning = safetensors.torch.load((tmp_path / "learning.safetensors").read_bytes())
    assert kept.keys() == learning.keys()
    assert not torch.equal(kept["head.1.weight"], learning["head.1.weight"])


def test_training_ends_when_its_patience_is_spent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loop, "_patience_spent", lambda rows, patience: len(rows) == patience)
    assert len(trained(TrainingSettings(epochs=3, patience=2), None, tmp_path)) == 2
    assert len(trained(TrainingSettings(epochs=3, patience=9), None, tmp_path)) == 3
