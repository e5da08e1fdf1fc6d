"""Streams: what each rank reads of them, in any number of loader processes."""

from __future__ import annotations

import logging
import pickle
from itertools import chain

import pytest
from torch.utils.data import get_worker_info as torch_worker_info

from dstrain.data import (
    LoaderOptions,
    Topology,
    build_loader,
    is_stream,
    iterate,
    micro_steps,
    set_epoch,
    windows,
)
from dstrain.data.streams import RankStream, Share
from tests.unit.data.loaders import (
    SERIAL,
    Counting,
    Shuffled,
    SplitByWorker,
    Squares,
    as_list,
    loaders,
    read,
    shapes,
    used,
)

# Three workers are a test of order, not of speed.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (Squares(3), False),
        ([1, 2], False),
        (Counting(3), True),
        ((i for i in range(3)), True),
        ({1, 2}, True),  # a length, but no order to index by
    ],
    ids=["map", "list", "iterable", "generator", "set"],
)
def test_is_stream(dataset, expected):
    assert is_stream(dataset) is expected


def test_datasets_of_hugging_face_are_told_apart():
    import datasets

    dataset = datasets.Dataset.from_dict({"x": [1, 2]})
    assert not is_stream(dataset)
    assert is_stream(dataset.to_iterable_dataset())


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [24, 19])
def test_a_stream_gives_what_a_map_style_dataset_gives_in_order(num_workers, size):
    """At the ragged end too, with padding batches on the same ranks: 3 ranks, micro-batch 2."""
    options = LoaderOptions(num_workers=num_workers)
    mapped = [read(loader) for loader in loaders(list(range(size)), 2, 3)]
    assert [read(loader) for loader in loaders(Counting(size), 2, 3, options)] == mapped


def test_drop_last_of_a_stream():
    streamed = [read(r) for r in loaders(Counting(11), 2, 2, LoaderOptions(drop_last=True))]
    mapped = [read(r) for r in loaders(list(range(11)), 2, 2, LoaderOptions(drop_last=True))]
    assert streamed == mapped


def test_micro_steps_of_a_stream_are_unknown():
    assert micro_steps(loaders(Counting(8), 2, 1)[0]) is None


def test_a_stream_counts_a_full_micro_step():
    assert shapes(list(windows(loaders(Counting(6), 2, 2)[0], 2))) == [(2, 8, True)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_start_leaves_out_what_was_used_of_a_stream(num_workers):
    (loader,) = loaders(Counting(10), 2, 1, LoaderOptions(num_workers=num_workers))
    set_epoch(loader, 0, start=6)
    assert used(loader) == [6, 7, 8, 9]


@pytest.mark.parametrize(
    "options",
    [SERIAL, LoaderOptions(num_workers=2), LoaderOptions(num_workers=2, persistent_workers=True)],
    ids=["serial", "workers", "persistent"],
)
def test_a_stream_is_told_its_epoch_and_forgets_an_old_start(options):
    """Loader processes that stay alive hold a copy: they once repeated epoch 0 without its first
    samples for the rest of the run."""
    (loader,) = loaders(Counting(6), 2, 1, options)
    set_epoch(loader, 0, start=4)
    assert used(loader) == [4, 5]
    set_epoch(loader, 1)
    assert used(loader) == [100, 101, 102, 103, 104, 105]


@pytest.mark.parametrize(
    "options",
    [SERIAL, LoaderOptions(num_workers=2), LoaderOptions(num_workers=2, persistent_workers=True)],
    ids=["serial", "workers", "persistent"],
)
def test_the_generator_of_a_stream_is_seeded_by_the_epoch(options):
    """All ranks must shuffle alike, epochs differently, and a resumed epoch as before."""
    ranks = loaders(Shuffled(20), 2, 2, options)

    def epoch(number: int) -> list[int]:
        parts = []
        for loader in ranks:
            set_epoch(loader, number)
            parts.append(read(loader))
        return list(chain(*(inputs for step in zip(*parts, strict=True) for inputs, _ in step)))

    orders = [epoch(0), epoch(1), epoch(0)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_stream_that_splits_itself_over_workers_loses_nothing(num_workers):
    """Every n-th micro-batch of a share would drop most samples without a word."""
    (loader,) = loaders(SplitByWorker(20), 2, 1, LoaderOptions(num_workers=num_workers))
    assert used(loader) == list(range(20))


class AsksInCollate:
    """A collator that asks for its loader process, as masking collators do for their seed."""

    def __call__(self, samples: list[int]) -> tuple[list[int], bool]:
        return samples, torch_worker_info() is not None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_collator_still_sees_its_loader_process(num_workers):
    loader = build_loader(
        Counting(4),
        Topology(2),
        AsksInCollate(),
        LoaderOptions(num_workers=num_workers),
        seed=0,
        shuffle=False,
    )
    expected = num_workers > 0
    assert [m.inputs for m, _ in iterate(loader)] == [([0, 1], expected), ([2, 3], expected)]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_hugging_face_stream_gives_the_same_with_any_number_of_workers(num_workers):
    """It would shuffle and split in another way inside a loader process."""
    import datasets

    stream = datasets.Dataset.from_dict({"x": list(range(9))}).to_iterable_dataset(num_shards=3)
    stream = stream.shuffle(seed=1, buffer_size=4)
    (serial,) = loaders(stream, 2, 1)
    (parallel,) = loaders(stream, 2, 1, LoaderOptions(num_workers=num_workers))
    for epoch in (0, 1):
        for loader in (serial, parallel):
            set_epoch(loader, epoch)
        expected = used(serial)
        assert used(parallel) == expected
        assert sorted(sample["x"] for sample in expected) == list(range(9))


@pytest.mark.parametrize("dataset", [[0, 1, 2], Counting(3)], ids=["map", "stream"])
def test_a_batch_reaches_the_model_as_the_collator_made_it(dataset):
    """torch turns tuples into lists and arrays into tensors where it thinks that it collates, and
    it would do so for whole micro-batches only, not for padding batches."""
    batches = []
    for rank in range(2):
        loader = build_loader(dataset, Topology(1, 2, rank), tuple, SERIAL, seed=0, shuffle=False)
        batches.append(read(loader))
    assert batches == [[((0,), False), ((2,), False)], [((1,), False), ((2,), True)]]


def test_a_stream_that_works_in_one_process_only_says_so(caplog):
    dataset = Counting(4)
    dataset.max_workers = 1
    with caplog.at_level(logging.WARNING, logger="dstrain"):
        (loader,) = loaders(dataset, 2, 1, LoaderOptions(num_workers=3))
    assert loader.num_workers == 1
    assert "using 1 instead of 3" in caplog.text


def test_an_empty_stream_gives_no_window():
    """The loop turns that into an error; it must not spin."""
    assert list(windows(loaders(Counting(0), 2, 2)[0], 2)) == []


def test_a_count_of_samples_survives_pinning():
    """torch's loader replaces what it can pin by a copy; the count must not get lost."""
    assert Share(["a"], 0).pin_memory() == Share(["a"], 0)


def test_a_rank_stream_can_be_sent_to_a_loader_process():
    """Where processes are spawned and not forked."""
    stream = RankStream(Counting(5), Topology(2), as_list)
    stream.set_epoch(1, start=2)
    shares = list(pickle.loads(pickle.dumps(stream)))
    assert shares == [Share([102, 103], 2), Share([104], 1)]
