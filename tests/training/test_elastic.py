"""What must hold when the number of workers changes during a run. `make faults` includes a real run
that loses and gains a node."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lungopacity.cli import main
from lungopacity.training.loop import Films, Worker
from lungopacity.training.settings import TrainingSettings

ELASTIC = TrainingSettings(batch_size=24, workers=1, max_workers=9)


def batches(settings: TrainingSettings, films: int, workers: int, rank: int) -> list[np.ndarray]:
    train = np.arange(films)
    data = Films(np.zeros((films, 1, 1), np.uint8), train % 2, train, train[:0], classes=2)
    return Worker(settings, data, rank, workers, torch.device("cpu")).batches(epoch=1)


@pytest.mark.parametrize("films", [24, 97, 240, 241])
def test_an_epoch_has_the_same_steps_however_many_share_it(films: int) -> None:
    alone = batches(ELASTIC, films, workers=1, rank=0)
    for workers in range(1, 10):
        ranks = [batches(ELASTIC, films, workers, rank) for rank in range(workers)]
        assert {len(own) for own in ranks} == {len(alone)}
        for step in zip(*ranks, strict=True):
            # DDP averages over ranks: a film counts the same only where batches are equal.
            assert len({len(own) for own in step}) == 1
            assert abs(sum(map(len, step)) - films / len(alone)) <= 2 * workers
        seen = np.concatenate([own for rank in ranks for own in rank])
        assert set(seen) == set(range(films))
        assert len(seen) < films + workers


@pytest.mark.parametrize("films", [1, 3, 25, 49])
def test_every_batch_has_at_least_the_two_films_that_batch_norm_needs(films: int) -> None:
    for settings, workers in ((ELASTIC, 9), (TrainingSettings(batch_size=2), 1)):
        ranks = [batches(settings, films, workers, rank) for rank in range(workers)]
        assert {len(own) for own in ranks} == {math.ceil(films / settings.batch_size)}
        assert min(len(batch) for own in ranks for batch in own) >= 2
        assert len({tuple(map(len, own)) for own in ranks}) == 1


@pytest.mark.parametrize("films", [33, 97, 240])
def test_a_worker_never_gets_more_than_its_share_of_a_batch(films: int) -> None:
    for workers in (1, 2, 3, 4, 6, 8):
        settings = replace(ELASTIC, workers=workers, max_workers=0)
        for own in batches(settings, films, workers, rank=0):
            assert len(own) <= 24 // workers


def test_a_batch_need_not_divide_where_the_number_of_workers_may_change() -> None:
    assert replace(ELASTIC, workers=2, batch_size=25).batch_size == 25
    with pytest.raises(ValueError, match="at least two films for each of up to 9 workers"):
        replace(ELASTIC, batch_size=17)
    with pytest.raises(ValueError, match="workers 10:9 must be MIN:MAX with 1 <= MIN <= MAX"):
        replace(ELASTIC, workers=10)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("many", "'many' is not of the form 4 or 2:8"),
        ("1:2:3", "'1:2:3' is not of the form 4 or 2:8"),
        ("8:2", "--workers 8:2 must be MIN:MAX with 1 <= MIN <= MAX"),
        ("0:2", "--workers must be 1 or more"),
        ("2:0", "--workers 2:0 must be MIN:MAX with 1 <= MIN <= MAX"),
        ("2:-1", "--workers 2:-1 must be MIN:MAX with 1 <= MIN <= MAX"),
        ("2:64", "--batch-size 32 must be at least two films for each of up to 64 workers"),
    ],
)
def test_an_impossible_range_of_workers_is_refused(word, said, tmp_path, capsys) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("image,label\na.png,Normal\nb.png,Lung_Opacity\n")
    command = ["train", "--images", str(tmp_path), "--labels", str(labels),
               "--output", str(tmp_path / "model"), "--workers", word]  # fmt: skip
    assert main(command) == 2
    assert said in capsys.readouterr().err
