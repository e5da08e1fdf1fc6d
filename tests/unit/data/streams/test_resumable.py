"""Streams that begin where a checkpoint was taken, at any topology: nothing is read again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import datasets
import pytest
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset

from dstrain.checkpoint.codec import decode, encode
from dstrain.core.errors import CheckpointError
from dstrain.core.progress import Progress
from dstrain.data import (
    LoaderOptions,
    Resumable,
    Topology,
    build_loader,
    keep_source_states,
    set_epoch,
    source_state,
    windows,
)
from dstrain.data.streams import Share, ShareWithState
from dstrain.training.resume import Position

SERIAL = LoaderOptions()
READ: list[int] = []  # samples that were made, in the order in which they were


class Telling(IterableDataset[int]):
    """The stream 0, 1, ... of an epoch, which knows where it is; epoch e begins at 100 e."""

    def __init__(self, size: int = 30) -> None:
        self.size = size
        self.epoch = self.given = self.begin = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin = state["given"]

    def __iter__(self) -> Iterator[int]:
        self.given, self.begin = self.begin, 0
        while self.given < self.size:
            self.given += 1
            READ.append(100 * self.epoch + self.given - 1)
            yield READ[-1]


def shards(numbers: list[int]) -> Iterator[dict[str, int]]:
    for number in numbers:
        for i in range(5):
            READ.append(10 * number + i)
            yield {"x": READ[-1]}


def from_shards() -> datasets.IterableDataset:
    return datasets.IterableDataset.from_generator(shards, gen_kwargs={"numbers": list(range(6))})


def from_table() -> datasets.IterableDataset:
    table = datasets.Dataset.from_dict({"x": list(range(45))}).to_iterable_dataset(num_shards=4)
    return table.filter(lambda row: row["x"] % 3).map(double, batched=True, batch_size=4).skip(7)


def double(rows: dict[str, list[int]]) -> dict[str, list[int]]:
    return {"x": [sign * x for x in rows["x"] for sign in (1, -1)]}


async def later(row: dict[str, int]) -> dict[str, int]:
    return row


def one_after_the_other() -> datasets.IterableDataset:
    return datasets.concatenate_datasets([from_shards(), from_shards().take(9)])


def from_buffers() -> datasets.IterableDataset:
    parts = [from_shards().shuffle(seed=seed, buffer_size=7) for seed in (1, 2)]
    return datasets.interleave_datasets(parts, probabilities=[0.7, 0.3], seed=3)


def as_list(samples: list[Any]) -> list[Any]:
    return samples


def ranks_of(
    source: Callable[[], Any], micro_batch: int, world_size: int, options: LoaderOptions = SERIAL
) -> list[Any]:
    """Return a loader of each rank, over a source of its own as in processes."""
    return [
        build_loader(
            source(),
            Topology(micro_batch, world_size, rank),
            as_list,
            options,
            seed=7,
            shuffle=True,
        )
        for rank in range(world_size)
    ]


def samples_of(ranks: list[Any], accumulation: int) -> Iterator[list[Any]]:
    """Yield the samples of each window, in the order of the stream."""
    for parts in zip(*(windows(loader, accumulation) for loader in ranks), strict=True):
        micro_batches = zip(*(window.micro_batches for window in parts), strict=True)
        yield [s for step in micro_batches for m in step if not m.is_padding for s in m.inputs]


def flat(parts: Iterator[list[Any]]) -> list[Any]:
    return [sample for part in parts for sample in part]


def stop_after(
    source: Callable[[], Any], num_windows: int, epoch: int, options: LoaderOptions = SERIAL
) -> tuple[list[Any], Any]:
    """Return what 2 ranks used (micro-batch 2, windows of 2), and the state as in a file.

    8 samples each; the first micro-batch of the next window has been fetched too.
    """
    ranks = ranks_of(source, 2, 2, options)
    for loader in ranks:
        keep_source_states(loader)
        set_epoch(loader, epoch)
    used = flat(islice(samples_of(ranks, 2), num_windows))
    states = [source_state(loader, len(used)) for loader in ranks]
    assert states[0] == states[1]
    return used, decode(json.loads(json.dumps(encode(states[0], where="state"))))


def whole(source: Callable[[], Any], epoch: int) -> list[Any]:
    (loader,) = ranks_of(source, 1, 1)
    set_epoch(loader, epoch)
    return flat(samples_of([loader], 1))


@pytest.mark.parametrize(
    "source", [Telling, from_shards, from_table, one_after_the_other, from_buffers]
)
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("num_windows", [1, 3])
@pytest.mark.parametrize(("micro_batch", "world_size"), [(2, 2), (3, 1), (1, 5)])
def test_a_stream_goes_on_at_another_topology(source, epoch, num_windows, micro_batch, world_size):
    """And the epoch after that is a whole one."""
    used, state = stop_after(source, num_windows, epoch)
    assert state is not None
    ranks = ranks_of(source, micro_batch, world_size)
    for loader in ranks:
        set_epoch(loader, epoch, start=len(used), source=state)
    assert used + flat(samples_of(ranks, 1)) == whole(source, epoch)
    for loader in ranks:
        set_epoch(loader, epoch + 1)
    assert flat(samples_of(ranks, 2)) == whole(source, epoch + 1)


@pytest.mark.parametrize("source", [Telling, from_buffers])
@pytest.mark.parametrize(("before", "after"), [(2, 0), (2, 3), (0, 2)])
def test_loader_processes_tell_and_begin(source, before, after):
    """However many there are, samples and states are those of the training process."""
    _, serial = stop_after(source, 3, 1)
    used, state = stop_after(source, 3, 1, LoaderOptions(num_workers=before))
    assert state == serial
    rest = whole(source, 1)[len(used) :]
    options = LoaderOptions(num_workers=after, persistent_workers=after > 0)
    (loader,) = ranks_of(source, 3, 1, options)
    keep_source_states(loader)
    set_epoch(loader, 1, start=len(used), source=state)
    assert flat(samples_of([loader], 1)) == rest
    set_epoch(loader, 2)
    second = samples_of([loader], 1)
    assert flat(islice(second, 3)) == whole(source, 2)[:9]
    assert source_state(loader, 9) is not None


def test_what_loader_processes_send_is_pinned():
    class Batch:
        def pin_memory(self) -> str:
            return "pinned"

    told = ShareWithState(Share({"a": Batch()}, 2), 3, b"state").pin_memory()
    assert told == ShareWithState(Share({"a": "pinned"}, 2), 3, b"state")


def test_what_a_loader_process_cannot_send_is_not_known():
    class Unsendable(Telling):
        def state_dict(self) -> dict[str, Any]:
            return {"given": lambda: self.given}

    (loader,) = ranks_of(Unsendable, 2, 1, LoaderOptions(num_workers=1))
    keep_source_states(loader)
    set_epoch(loader, 0)
    assert flat(samples_of([loader], 1)) == list(range(30))
    assert source_state(loader, 30) is None


@pytest.mark.parametrize("workers", [0, 2])
def test_no_sample_that_was_used_is_read_again(workers):
    used, state = stop_after(Telling, 2, 1)
    READ.clear()
    (loader,) = ranks_of(Telling, 3, 1, LoaderOptions(num_workers=workers))
    set_epoch(loader, 1, start=16, source=state)
    rest = list(range(116, 130))
    assert flat(samples_of([loader], 1)) == rest
    assert len(READ) == (0 if workers else len(rest))
    assert used == list(range(100, 116))


def test_no_shard_that_was_used_is_read_again():
    """``datasets`` itself reads the begun one from its start, without what is mapped after it."""
    _, state = stop_after(from_shards, 2, 0)
    READ.clear()
    (loader,) = ranks_of(from_shards, 4, 1)
    set_epoch(loader, 0, start=16, source=state)
    flat(samples_of([loader], 1))
    assert set(READ) == {10 * shard + i for shard in (3, 4, 5) for i in range(5)}


def test_a_resumed_run_can_be_resumed():
    _, state = stop_after(from_table, 1, 0)
    (loader,) = ranks_of(from_table, 3, 1)
    keep_source_states(loader)
    set_epoch(loader, 0, start=8, source=state)
    used = flat(islice(samples_of([loader], 2), 2))
    (again,) = ranks_of(from_table, 5, 1)
    set_epoch(again, 0, start=20, source=source_state(loader, 20))
    assert used + flat(samples_of([again], 1)) == whole(from_table, 0)[8:]


def test_reading_another_part_of_the_same_data_moves_nothing():
    """``datasets`` keeps the position in what the two parts have in common."""
    data = from_shards()
    (loader,) = ranks_of(lambda: data.skip(4), 2, 1)
    keep_source_states(loader)
    set_epoch(loader, 0)
    parts = samples_of([loader], 1)
    used = flat(islice(parts, 2))
    assert len(list(data.take(4))) == 4  # an evaluation
    used += flat(islice(parts, 2))
    (resumed,) = ranks_of(lambda: data.skip(4), 2, 1)
    set_epoch(resumed, 0, start=8, source=source_state(loader, 8))
    assert used + flat(samples_of([resumed], 1)) == whole(lambda: data.skip(4), 0)


@pytest.mark.parametrize("options", [SERIAL, LoaderOptions(num_workers=1, persistent_workers=True)])
def test_a_state_is_used_where_it_was_taken_and_nowhere_else(options):
    _, state = stop_after(from_shards, 2, 0)
    (loader,) = ranks_of(from_shards, 2, 1, options)
    for epoch, start in ((0, 16), (0, 6), (1, 0)):
        set_epoch(loader, epoch, start=start, source=state if start == 16 else None)
        assert flat(samples_of([loader], 1)) == whole(from_shards, epoch)[start:]


def test_a_state_of_another_stream_is_left_aside():
    _, state = stop_after(from_shards, 2, 0)
    (loader,) = ranks_of(Telling, 2, 1)
    set_epoch(loader, 0, start=16, source=state)
    assert flat(samples_of([loader], 1)) == list(range(16, 30))


@pytest.mark.parametrize(
    "dataset",
    [
        from_shards().with_format("arrow"),
        from_shards().map(later),
        [1, 2],
    ],
    ids=["tables", "asynchronous", "no stream"],
)
def test_what_cannot_tell_its_position_exactly(dataset):
    assert Resumable.of(dataset) is None


PARTS = {
    "samples": lambda: from_shards().map(lambda row: {"x": row["x"]}),
    "shards": lambda: from_shards(),
    "rows of tables": lambda: datasets.Dataset.from_dict(
        {"x": list(range(45))}
    ).to_iterable_dataset(num_shards=5),
    "buffers": lambda: from_shards().shuffle(seed=1, buffer_size=4),
}


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("kind", PARTS)
def test_parts_of_ranks_begin_where_each_was(kind, world_size):
    """Split by node, in whichever way: each rank's own state, also with other micro-batches."""

    def part(rank):
        loader = build_loader(
            split_dataset_by_node(PARTS[kind](), rank=rank, world_size=world_size),
            Topology(2, world_size, rank),
            as_list,
            SERIAL,
            seed=7,
            shuffle=True,
        )
        keep_source_states(loader)
        return loader

    for rank in range(world_size):
        (whole := part(rank)), set_epoch(whole, 1)
        steps = list(windows(whole, 1))
        samples = [s["x"] for w in steps for m in w.micro_batches for s in m.inputs]
        expected = [row["x"] for row in _of_epoch(whole.dataset.source, 1)]
        assert samples == expected
        for done in range(1, len(steps)):
            (again := part(rank)), set_epoch(again, 1)
            going = windows(again, 1)
            for _ in range(done):
                used = next(going).num_samples
            position = used * done
            state = json.loads(json.dumps(encode(source_state(again, position), where="")))
            later = part(rank)
            set_epoch(later, 1, start=position, source=decode(state))
            rest = [s["x"] for w in windows(later, 1) for m in w.micro_batches for s in m.inputs]
            assert rest == samples[2 * done :]


def _of_epoch(source, epoch):
    source.set_epoch(epoch)
    return source


def test_states_are_kept_for_checkpoints_only():
    (loader,) = ranks_of(Telling, 2, 1)
    set_epoch(loader, 0)
    next(windows(loader, 2))
    assert source_state(loader, 4) is None


def test_a_dispatched_stream_goes_on():
    options = LoaderOptions(dispatch=True)
    (loader,) = ranks_of(from_shards, 2, 1, options)
    keep_source_states(loader)
    set_epoch(loader, 0)
    used = flat(islice(samples_of([loader], 2), 4))
    state = source_state(loader, 16)
    READ.clear()
    (resumed,) = ranks_of(from_shards, 3, 1, options)
    set_epoch(resumed, 0, start=16, source=state)
    assert used + flat(samples_of([resumed], 1)) == whole(from_shards, 0)
    assert READ[0] == 30


def test_a_dispatched_stream_that_was_sent_further_than_used_does_not_know():
    """Blocks that began inside of a micro-batch: no state is right for where it ends."""
    (loader,) = ranks_of(from_shards, 4, 1, LoaderOptions(dispatch=True))
    keep_source_states(loader)
    set_epoch(loader, 0, start=6)
    next(windows(loader, 1))
    assert source_state(loader, 10) is None


def position(source: dict[str, Any] | None) -> Position:
    meter = {"loss": 0.0, "finite": 0.0, "bad": -1.0, "steps": 0, "tokens": 0, "seconds": 0.0}
    return Position(Progress(), False, True, None, 0.1, 0, 0.0, 0, [meter], source=source)


def test_the_state_is_part_of_the_position_where_it_can_be_written():
    assert Position.of(position({"a": (1, 2)}).shared()).source == {"a": (1, 2)}
    assert position({"a": object()}).shared()["source"] is None


def test_a_position_of_an_older_checkpoint():
    shared = position(None).shared()
    del shared["source"]
    assert Position.of(shared).source is None


def test_a_state_that_a_stream_cannot_take_up_is_one_error_that_names_it():
    """A stream is the user's, and what its state must be only it knows."""

    class Own(list):
        def state_dict(self) -> dict[str, Any]:
            return {"at": len(self)}

        def load_state_dict(self, state: Any) -> None:
            del self[: state["at"]]

    stream = Resumable.of(Own([1, 2]))
    assert stream is not None
    kind = stream.state()["kind"]
    assert not stream.load({})
    for state in ({"kind": kind}, {"kind": kind, "state": {"at": "x"}}, {"kind": kind, "state": 3}):
        with pytest.raises(CheckpointError, match="a Own, cannot take up its state"):
            stream.load(state)
