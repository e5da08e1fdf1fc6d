"""A stream that every rank shuffles for itself: an error where it is certain, else a warning."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import IterableDataset

from dstrain.data.comparison.stream_watch import num_moved
from tests.distributed.later_splits import alike_on_all
from tests.distributed.runs import make_trainer
from tests.distributed.split_data import warnings_of


class Shuffled(IterableDataset[Any]):
    """The same rows on all ranks, in an order that is new in every reading."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Any]:
        order = list(range(self.size))
        random.SystemRandom().shuffle(order)
        for number in order:
            tokens = [3 + number % 7, 3 + number // 7 % 11, 3 + number // 77 % 11, 4, 5]
            yield {"input_ids": tokens, "labels": tokens}


class Drawn(IterableDataset[Any]):
    """Noise of a few hundred values, drawn anew in every reading: there is no order."""

    def __iter__(self) -> Iterator[Any]:
        draw = random.SystemRandom()
        for _ in range(100):
            tokens = [3 + draw.randrange(7), 3 + draw.randrange(11), 4, 4, 5]
            yield {"input_ids": tokens, "labels": tokens}


@pytest.mark.ranks(2, timeout=200)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_in_another_order_on_each_rank_ends_the_run(
    num_workers: int, tmp_path: Path
) -> None:
    from dstrain.core.errors import DataError

    trainer = make_trainer(
        tmp_path, data=Shuffled(100), per_device_train_batch_size=4, max_steps=12, evaluation=0,
        dataloader_num_workers=num_workers,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"read in another order on rank 1 than on rank 0") as found:
        trainer.train()
    text = str(found.value)
    assert "the same seed on all ranks" in text
    assert alike_on_all(text)
    trainer.close()


@pytest.mark.ranks(2, timeout=200)
@pytest.mark.parametrize("data", [Drawn(), Shuffled(10**5)], ids=["drawn", "long"])
def test_where_it_is_not_certain_a_warning_is_all(
    data: Any, tmp_path: Path, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(
        tmp_path, data=data, per_device_train_batch_size=4, max_steps=12, evaluation=0
    )
    trainer.train()
    assert trainer.state.global_step == 12
    told = warnings_of(caplog, "A stream that is shuffled must be so with the same seed")
    assert bool(told) == (rank == 0)
    trainer.close()


def look(numbers: list[int], labels: list[int] | None = None) -> dict[str, list[Any]]:
    found = {"id": [("exact", n) for n in numbers]}
    return found if labels is None else found | {"label": [("exact", n) for n in labels]}


def test_only_samples_at_other_places_count() -> None:
    order = list(range(20))
    assert num_moved(look(order), look(order)) == 0
    assert num_moved(look(order), look(order[::-1])) == 20
    assert num_moved(look(order), look([*range(10), *range(100, 110)])) == 0
    assert num_moved(look(order), look([*range(50, 60), *range(10)])) == 10


def test_what_comes_twice_may_be_noise() -> None:
    order = list(range(20))
    assert num_moved(look([*order, 3]), look(order[::-1])) == 0
    assert num_moved(look(order), look([*order[::-1], 3])) == 0


def test_a_label_that_stays_tells_the_order() -> None:
    order = list(range(20))
    assert num_moved(look(order, order), look(order[::-1], order)) == 0
