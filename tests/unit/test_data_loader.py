"""Loaders of one rank, accumulation windows, streams, and the columns that a model takes."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset
from torch.utils.data import get_worker_info as torch_worker_info

from dstrain.core.errors import DataError
from dstrain.data import (
    AheadHooks,
    LoaderOptions,
    Topology,
    Window,
    build_loader,
    fetches_ahead,
    is_stream,
    iterate,
    keep_columns,
    micro_steps,
    set_epoch,
    windows,
)
from dstrain.data.streams import RankStream, Share

# Three workers are a test of order, not of speed.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

SERIAL = LoaderOptions()


def as_list(samples: list[Any]) -> list[Any]:
    """Collate by leaving samples as they are; loader processes can pickle this function."""
    return list(samples)


class Squares(Dataset[int]):
    """Sample i is i * i."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index * index


class Counting(IterableDataset[int]):
    """The stream 0, 1, ... of an epoch; epoch e begins at 100 e."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(100 * self.epoch, 100 * self.epoch + self.size))


class SplitByWorker(Counting):
    """The pattern of torch's documentation: each loader process reads a share of the samples."""

    def __iter__(self) -> Iterator[int]:
        info = torch_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        yield from range(first, self.size, step)


class Shuffled(IterableDataset[int]):
    """A stream that shuffles with its own generator, as transformers documents it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.generator = torch.Generator()

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.size, generator=self.generator).tolist()


def loaders(
    dataset: Any,
    micro_batch: int,
    world_size: int,
    options: LoaderOptions = SERIAL,
    *,
    shuffle: bool = False,
) -> list[Any]:
    """Return the loaders of all ranks."""
    return [
        build_loader(
            dataset,
            Topology(micro_batch, world_size, rank),
            as_list,
            options,
            seed=7,
            shuffle=shuffle,
        )
        for rank in range(world_size)
    ]


def read(loader: Any) -> list[tuple[list[Any], bool]]:
    """Return inputs and whether they are masked, per micro-step."""
    return [(micro_batch.inputs, micro_batch.is_padding) for micro_batch, _ in iterate(loader)]


def used(loader: Any) -> list[Any]:
    """Return samples that carry weight, in order."""
    return list(chain(*(inputs for inputs, masked in read(loader) if not masked)))


# --- map-style datasets --------------------------------------------------------------------------


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


# --- accumulation windows ------------------------------------------------------------------------


def shapes(given: list[Window]) -> list[tuple[int, int, bool]]:
    return [(len(w.micro_batches), w.num_samples, w.ends_epoch) for w in given]


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


def test_a_rank_without_a_sample_has_a_masked_stand_in():
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


# --- a user's own loader -------------------------------------------------------------------------


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


def test_set_epoch_is_nothing_to_a_plain_iterable():
    set_epoch([1, 2], 3)


# --- streams -------------------------------------------------------------------------------------


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
    """At the ragged end too, with stand-ins for the same ranks: 3 ranks with micro-batch 2."""
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
    it would do so for whole micro-batches only, not for stand-ins."""
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


# --- how many samples a micro-batch holds --------------------------------------------------------


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


# --- columns -------------------------------------------------------------------------------------

ROWS = {"input_ids": [[1], [2]], "labels": [[3], [4]], "text": ["a", "b"]}
AS_SAMPLES = [{name: column[i] for name, column in ROWS.items()} for i in range(2)]


def test_a_dataset_loses_unused_columns_before_it_is_read():
    import datasets

    dataset, collate = keep_columns(
        datasets.Dataset.from_dict(ROWS), as_list, ["input_ids", "labels"], description="training"
    )
    assert dataset.column_names == ["input_ids", "labels"]
    assert collate is as_list


@pytest.mark.parametrize("streams", [False, True])
def test_other_datasets_lose_unused_columns_in_front_of_the_collator(streams):
    import datasets

    dataset = datasets.Dataset.from_dict(ROWS).to_iterable_dataset() if streams else AS_SAMPLES
    same, collate = keep_columns(dataset, as_list, ["input_ids"], description="training")
    assert same is dataset
    collate = pickle.loads(pickle.dumps(collate))  # loader processes may be spawned
    assert collate(list(dataset)) == [{"input_ids": [1]}, {"input_ids": [2]}]
    assert list(AS_SAMPLES[0]) == list(ROWS), "the user's own samples stay whole"


def test_samples_that_are_no_dicts_are_left_alone():
    _, collate = keep_columns([(1, 2)], as_list, ["input_ids"], description="training")
    assert collate([(1, 2)]) == [(1, 2)]


@pytest.mark.parametrize("as_dataset", [True, False])
def test_no_column_left_is_an_error_that_names_both_sides(as_dataset):
    """Otherwise the model is called with nothing, and the message is about a missing argument."""
    import datasets

    rows = [{"text": "a", "n": 1}]
    dataset = datasets.Dataset.from_list(rows) if as_dataset else rows

    def attempt() -> None:
        _, collate = keep_columns(dataset, as_list, ["input_ids"], description="evaluation")
        collate(rows)

    with pytest.raises(DataError, match=r"evaluation set has columns \['text', 'n'\]") as caught:
        attempt()
    assert "it takes input_ids" in str(caught.value)


# --- going on from a checkpoint ------------------------------------------------------------------


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
