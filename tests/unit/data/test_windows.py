"""Accumulation windows, a user's own loader, and going on inside of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader, DistributedSampler

from dstrain.data import (
    AheadHooks,
    fetches_ahead,
    micro_steps,
    set_epoch,
    windows,
)
from tests.unit.data.loaders import Counting, Squares, as_list, loaders, read, shapes

# Three workers are a test of order, not of speed.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.mark.parametrize(
    ("size", "accumulation", "expected"),
    [
        (16, 2, [(2, 8, False), (2, 8, True)]),
        (20, 2, [(2, 8, False), (2, 8, False), (1, 4, True)]),  # a short last window
        (18, 2, [(2, 8, False), (2, 8, False), (1, 2, True)]),  # of a short micro-step
        (3, 4, [(1, 3, True)]),  # less than one global batch trains too
        (12, 1, [(1, 4, False), (1, 4, False), (1, 4, True)]),
    ],
)
def test_windows_of_an_epoch(size, accumulation, expected):
    """Two ranks with micro-batch 2; ranks that disagree would hang."""
    for loader in loaders(Squares(size), 2, 2):
        assert shapes(list(windows(loader, accumulation))) == expected


def test_windows_hold_the_micro_batches_in_order_and_none_is_lost():
    (loader,) = loaders(Squares(9), 2, 1)
    got = [m.inputs for window in windows(loader, 3) for m in window.micro_batches]
    assert got == [[0, 1], [4, 9], [16, 25], [36, 49], [64]]


def test_a_rank_without_a_sample_has_a_padding_batch():
    """5 samples on 4 ranks: in the second micro-step three ranks have nothing."""
    last = [list(windows(loader, 2))[-1].micro_batches[-1] for loader in loaders(Squares(5), 1, 4)]
    assert [m.is_padding for m in last] == [False, True, True, True]
    assert all(m.inputs == [16] for m in last)


def test_windows_of_nothing():
    assert list(windows([], 2)) == []


def test_windows_do_not_read_far_ahead():
    """One micro-batch ahead tells the end of an epoch; more would hold batches in memory."""
    taken: list[int] = []

    def source() -> Iterator[int]:
        for i in range(10):
            taken.append(i)
            yield i

    next(windows(source(), 2))
    assert taken == [0, 1, 2]


def test_a_users_own_loader_is_this_ranks_share():
    loader = DataLoader(Squares(5), batch_size=2, collate_fn=as_list)
    assert read(loader) == [([0, 1], False), ([4, 9], False), ([16], False)]
    assert micro_steps(loader) == 3
    assert shapes(list(windows(loader, 2))) == [(2, 0, False), (1, 0, True)]


def test_micro_steps_of_what_has_no_length_are_unknown():
    assert micro_steps(iter([1, 2])) is None
    assert micro_steps(DataLoader(Counting(5), batch_size=2)) is None
    assert micro_steps([1, 2, 3]) == 3


def test_set_epoch_reaches_the_sampler_of_a_users_own_loader():
    """Without it a DistributedSampler repeats the order of its first epoch."""
    sampler = DistributedSampler(Squares(8), num_replicas=2, rank=0)
    set_epoch(DataLoader(Squares(8), sampler=sampler), 3)
    assert sampler.epoch == 3


def test_set_epoch_reaches_the_dataset_of_a_users_own_loader():
    dataset = Counting(4)
    set_epoch(DataLoader(dataset, batch_size=2), 3)
    assert dataset.epoch == 3


def test_set_epoch_reaches_a_loader_that_takes_it_itself():
    class Loader(list[int]):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    loader = Loader([1])
    set_epoch(loader, 3)
    assert loader.epoch == 3


def test_set_epoch_is_nothing_to_a_plain_iterable():
    set_epoch([1, 2], 3)


def test_a_sampler_of_ours_is_not_asked_ahead():
    """What is fetched early draws its random numbers before the checkpoint of a step is taken."""
    taken: list[int] = []

    class Watched(Squares):
        def __getitem__(self, index: int) -> int:
            taken.append(index)
            return super().__getitem__(index)

    (loader,) = loaders(Watched(9), 2, 1)
    assert not fetches_ahead(loader)
    next(windows(loader, 2))
    assert taken == [0, 1, 2, 3]


def test_the_hooks_stand_around_what_is_fetched_ahead():
    """Before the first micro-batch of each next window, and around the first that is used."""
    happened: list[Any] = []

    def source() -> Iterator[int]:
        for i in range(5):
            happened.append(i)
            yield i

    hooks = AheadHooks(
        before=lambda: happened.append("before"),
        before_first=lambda: happened.append("first?"),
        after_first=lambda: happened.append("first"),
    )
    for _ in windows(source(), 2, ahead=hooks, skip=1):
        happened.append("window")
    assert happened == [0, "first?", 1, "first", 2, "before", 3, "window", 4, "before", "window"]


def test_micro_batches_of_a_foreign_loader_are_skipped():
    """It can only be read from its beginning."""
    assert [w.micro_batches[0].inputs for w in windows(list(range(5)), 2, skip=2)] == [2, 4]


def test_noise_of_loader_processes_is_that_of_the_epoch():
    """A run that goes on in epoch 1 draws what the run that began at epoch 0 draws there."""
    (whole,), (resumed,) = loaders(Squares(8), 2, 1), loaders(Squares(8), 2, 1)
    seeds = []
    for epoch in (0, 1, 2):
        set_epoch(whole, epoch)
        seeds.append(iter(whole)._base_seed)
    assert len(set(seeds)) == 3
    set_epoch(resumed, 1, start=4)
    iter(resumed)
    set_epoch(resumed, 2)
    assert iter(resumed)._base_seed == seeds[2]
