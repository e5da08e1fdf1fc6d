"""Loaders of one rank: datasets with a length, and how many samples a micro-batch holds."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from dstrain.core.errors import DataError
from dstrain.data import (
    LoaderOptions,
    Topology,
    build_loader,
    iterate,
    micro_steps,
    set_epoch,
)
from tests.unit.data.loaders import SERIAL, Counting, Squares, as_list, loaders, read, used

# Three workers are a test of order, not of speed.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_ranks_together_read_every_sample_once(num_workers):
    ranks = loaders(Squares(23), 2, 3, LoaderOptions(num_workers=num_workers), shuffle=True)
    seen = list(chain(*(used(loader) for loader in ranks)))
    assert sorted(seen) == [i * i for i in range(23)]


def test_workers_do_not_change_the_order():
    serial, parallel = (
        loaders(Squares(23), 2, 1, LoaderOptions(num_workers=n), shuffle=True)[0] for n in (0, 2)
    )
    assert read(serial) == read(parallel)


def test_the_seed_and_the_epoch_decide_the_order():
    (loader,) = loaders(Squares(50), 5, 1, shuffle=True)
    first = read(loader)
    assert read(loader) == first
    set_epoch(loader, 1)
    assert read(loader) != first
    set_epoch(loader, 0)
    assert read(loader) == first


def test_loading_neither_reads_nor_moves_the_global_random_state():
    """Dropout masks of training must not depend on how data is loaded."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    (loader,) = loaders(Squares(8), 2, 1, LoaderOptions(num_workers=1), shuffle=True)
    read(loader)
    assert torch.get_rng_state().equal(state)


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="the dataset is empty"):
        loaders(Squares(0), 2, 1)


def test_drop_last_drops_what_does_not_fill_every_rank():
    ranks = loaders(Squares(11), 2, 2, LoaderOptions(drop_last=True))
    assert [used(loader) for loader in ranks] == [[0, 1, 16, 25], [4, 9, 36, 49]]


def test_a_start_goes_on_where_the_epoch_was_left():
    (loader,) = loaders(Squares(10), 2, 1, shuffle=True)
    whole = used(loader)
    set_epoch(loader, 0, start=6)
    assert used(loader) == whole[6:]


@pytest.mark.parametrize(
    ("size", "drop_last", "expected"), [(12, False, 3), (13, False, 4), (13, True, 3), (3, True, 0)]
)
def test_micro_steps_of_an_epoch(size, drop_last, expected):
    for loader in loaders(Squares(size), 2, 2, LoaderOptions(drop_last=drop_last)):
        assert micro_steps(loader) == expected
        assert len(read(loader)) == expected


def test_micro_steps_are_those_of_the_whole_epoch_after_a_start_too():
    """The schedule of a resumed run needs the length of an epoch, not of the rest of one."""
    (loader,) = loaders(Squares(12), 2, 1)
    set_epoch(loader, 0, start=8)
    assert micro_steps(loader) == 6
    assert len(read(loader)) == 2


class Growing(Squares):
    """Has two more samples in each epoch, as a curriculum may."""

    def set_epoch(self, epoch: int) -> None:
        self.size = 4 + 2 * epoch


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_dataset_with_a_length_is_told_its_epoch_and_may_change_its_length(shuffle):
    loader = build_loader(Growing(4), Topology(2), as_list, options=SERIAL, seed=0, shuffle=shuffle)
    for epoch in range(3):
        set_epoch(loader, epoch)
        read = sorted(chain.from_iterable(batch for batch in loader))
        assert read == [i * i for i in range(4 + 2 * epoch)]
    set_epoch(loader, 0, trains=False)
    assert len(loader.dataset) == 8


def test_a_dataset_that_changes_its_length_is_not_grouped_by_length():
    loader = build_loader(
        Growing(4), Topology(2), as_list, options=SERIAL, seed=0, shuffle=True, lengths=[1, 2, 3, 4]
    )
    set_epoch(loader, 0)
    with pytest.raises(DataError, match="made 6 samples of the dataset's 4"):
        set_epoch(loader, 1)


def as_one_row(samples: list[int]) -> dict[str, torch.Tensor]:
    """Collate to a padding-free batch: one row, and as many patches as the row has tokens."""
    return {"pixel_values": torch.zeros(5, 3), "input_ids": torch.tensor([samples])}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dataset", [list(range(7)), Counting(7)], ids=["map", "stream"])
def test_a_micro_batch_knows_its_samples_whatever_the_collator_makes_of_them(dataset, num_workers):
    """No tensor of a padding-free batch, and not the patches of Qwen2-VL, says how many."""
    for rank, expected in enumerate([[2, 2], [2, 1]]):
        loader = build_loader(
            dataset,
            Topology(2, 2, rank),
            as_one_row,
            LoaderOptions(num_workers=num_workers),
            seed=7,
            shuffle=False,
        )
        found = [micro_batch for micro_batch, _ in iterate(loader)]
        assert [m.num_samples for m in found] == expected
        assert [m.inputs["input_ids"].shape[0] for m in found] == [1, 1]


def test_whoever_iterates_over_a_streams_loader_gets_plain_micro_batches():
    """Stand-ins too, as from the loader of a map-style dataset."""
    (loader, other) = loaders(Counting(3), 1, 2)
    assert list(loader) == [[0], [2]]
    assert list(other) == [[1], [2]]
