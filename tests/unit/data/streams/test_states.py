"""Pipelines of ``datasets`` put together at random: begun at a state, each goes on exactly."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets.iterable_dataset import ArrowExamplesIterable

from dstrain.checkpoint.codec import decode, encode
from dstrain.core.errors import DataError
from dstrain.data import Resumable

READ: list[int] = []  # rows that sources made
LONGEST = 100  # rows of a pipeline that are looked at
STRATEGIES = ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement")

Stream = datasets.IterableDataset


def rows_of(shards: list[tuple[int, int]]) -> Iterator[dict[str, int]]:
    for first, size in shards:
        for x in range(first, first + size):
            READ.append(x)
            yield {"x": x, "y": 0}


def tables_of(shards: list[tuple[int, int]]) -> Iterator[tuple[str, pa.Table]]:
    for first, size in shards:
        for x in range(first, first + size, 3):
            numbers = list(range(x, min(x + 3, first + size)))
            READ.extend(numbers)
            yield f"{x}", pa.table({"x": numbers, "y": [0] * len(numbers)})


def from_rows(shards: list[tuple[int, int]]) -> Stream:
    return Stream.from_generator(rows_of, gen_kwargs={"shards": shards})


def from_tables(shards: list[tuple[int, int]]) -> Stream:
    return Stream(ArrowExamplesIterable(tables_of, {"shards": shards}))


def from_memory(shards: list[tuple[int, int]]) -> Stream:
    numbers = [x for first, size in shards for x in range(first, first + size)]
    table = datasets.Dataset.from_dict({"x": numbers, "y": [0] * len(numbers)})
    return table.to_iterable_dataset(num_shards=min(len(numbers), len(shards)))


def twice(rows: dict[str, list[int]]) -> dict[str, list[int]]:
    return {"x": [int(x) for x in rows["x"] for _ in "ab"], "y": [1, 2] * len(rows["y"])}


def in_numpy(data: Stream, batch_size: int) -> Stream:
    formatted = data.with_format("numpy")
    return formatted.map(twice, batched=True, batch_size=batch_size).with_format(None)


def side_by_side(parts: list[Stream]) -> Stream:
    x, y = parts[0].select_columns(["x"]), parts[1].select_columns(["y"])
    return datasets.concatenate_datasets([x.repeat(None), y.repeat(None)], axis=1).take(40)


class Composer:
    """Makes pipelines of the columns x and y: the same one for the same seed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.first = 0

    def whole(self) -> Stream:
        data = self.stream()
        return data.with_format("numpy") if self.chance.random() < 0.2 else data

    def stream(self, depth: int = 0) -> Stream:
        joins = depth < 2 and self.chance.random() < 0.5
        data = self.joined(depth) if joins else self.source()
        for _ in range(self.chance.randint(0, 3)):
            data = self.step(data)
        return data

    def source(self) -> Stream:
        shards = []
        for _ in range(self.chance.randint(1, 4)):
            shards.append((self.first, self.chance.randint(1, 12)))
            self.first += 100
        return self.chance.choice([from_rows, from_tables, from_memory])(shards)

    def joined(self, depth: int) -> Stream:
        parts = [self.stream(depth + 1) for _ in range(self.chance.randint(2, 3))]
        parts = [part if any(True for _ in part.take(1)) else self.source() for part in parts]
        weights = [self.chance.random() + 0.1 for _ in parts]
        strategy = self.chance.choice(STRATEGIES)
        ways: list[Callable[[], Stream]] = [
            lambda: datasets.concatenate_datasets(parts),
            lambda: side_by_side(parts),
            lambda: datasets.interleave_datasets(parts, stopping_strategy=strategy),
            lambda: datasets.interleave_datasets(
                parts,
                probabilities=[weight / sum(weights) for weight in weights],
                seed=len(parts),
                stopping_strategy=strategy,
            ),
        ]
        return self.chance.choice(ways)()

    def step(self, data: Stream) -> Stream:
        n = self.chance.randint(1, 6)
        steps: list[Callable[[], Stream]] = [
            lambda: data.map(lambda row: {"y": row["x"] + row["y"]}),
            lambda: data.map(lambda row, i: {"y": i}, with_indices=True),
            lambda: data.map(twice, batched=True, batch_size=n),
            lambda: data.filter(lambda row: row["x"] % 7),
            lambda: data.filter(lambda r: [x % 5 > 0 for x in r["x"]], batched=True, batch_size=n),
            lambda: data.select_columns(["x"]).map(lambda row: {"y": 3}),
            lambda: data.skip(n),
            lambda: data.take(5 * n),
            lambda: (
                data.with_format("numpy").map(twice, batched=True, batch_size=n).with_format(None)
            ),
            lambda: data.repeat(2 if n < 6 else None),
            lambda: data.shuffle(seed=n, buffer_size=2 * n - 1),
            lambda: data.shuffle(seed=n, buffer_size=3 * n, max_buffer_input_shards=2),
        ]
        return self.chance.choice(steps)()


def plain(rows: Iterator[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(int(row["x"]), int(row["y"])) for row in rows]


def resumable(data: Stream, epoch: int) -> Resumable:
    found = Resumable.of(data)
    assert found is not None
    found.source.set_epoch(epoch)
    return found


def as_in_a_file(state: dict[str, Any] | None) -> dict[str, Any]:
    assert state is not None
    return decode(json.loads(json.dumps(encode(state, where="state"))))


@pytest.mark.parametrize("seed", range(40))
def test_a_pipeline_goes_on_from_any_of_its_states(seed):
    """Twice over: a run that was resumed is resumed; its rows are in the order of ``datasets``."""
    epoch = seed % 3
    untouched = Composer(seed).whole()
    untouched.set_epoch(epoch)
    expected = plain(islice(untouched, LONGEST))
    position, state = 0, None
    made = Composer(seed).whole()
    for stop in sorted(random.Random(seed).sample(range(1, LONGEST), 4)):
        data = resumable(made, epoch)  # in steps of its own
        if state is not None:
            assert data.load(state)
            rest = plain(islice(data.source, LONGEST - position))
            assert rest == expected[position:]
            assert data.load(state)
        rows = iter(data.source)
        assert plain(islice(rows, stop - position)) == expected[position:stop]
        position, state = min(stop, len(expected)), as_in_a_file(data.state())


def long_shuffled() -> Stream:
    parts = [
        make([(1000 * n + 10 * i, 10) for i in range(100)]).shuffle(seed=n, buffer_size=32)
        for n, make in enumerate((from_rows, from_tables))
    ]
    return datasets.interleave_datasets([part.map(lambda row: row) for part in parts])


def test_what_is_read_again_does_not_grow_with_the_position():
    """Two sources of 1,000 rows: each half of a buffer of 32, over and over, and 10 open shards."""
    rows = iter((data := resumable(long_shuffled(), 1)).source)
    read = []
    for _ in range(6):
        assert len(plain(islice(rows, 300))) == 300
        again = resumable(long_shuffled(), 1)
        assert again.load(as_in_a_file(data.state()))
        READ.clear()
        first = next(iter(again.source))
        read.append(len(READ))
        assert first is not None
    assert max(read) < 450
    assert max(read[3:]) < 1.5 * max(read[:3])


def test_a_state_does_not_hold_the_buffer():
    data = resumable(from_rows([(0, 5000)]).shuffle(seed=0, buffer_size=1000), 0)
    rows = iter(data.source)
    plain(islice(rows, 3000))
    assert len(json.dumps(as_in_a_file(data.state()))) < 1000


def test_another_buffer_size_is_another_stream():
    data = resumable(from_rows([(0, 50)]).shuffle(seed=0, buffer_size=10), 0)
    plain(islice(data.source, 20))
    other = resumable(from_rows([(0, 50)]).shuffle(seed=0, buffer_size=11), 0)
    assert not other.load(as_in_a_file(data.state()))


@pytest.mark.parametrize("make", [from_rows, from_tables, from_memory])
def test_data_that_lost_rows_is_told(make):
    """Never a row that stands for one that is missing."""
    data = resumable(make([(0, 200)]).shuffle(seed=0, buffer_size=20), 0)
    plain(islice(data.source, 150))
    shorter = resumable(make([(0, 100)]).shuffle(seed=0, buffer_size=20), 0)
    assert shorter.load(as_in_a_file(data.state()))
    with pytest.raises(DataError, match="ended before the position"):
        next(iter(shorter.source))


def test_a_generator_whose_state_is_no_plain_value_is_no_hindrance():
    """Such a state is left out of a checkpoint, and the stream is read again."""
    chance = np.random.Generator(np.random.MT19937(3))
    data = from_rows([(0, 50)]).shuffle(generator=chance, buffer_size=10)
    expected = plain(iter(data))
    begun = resumable(data, 0)
    used = plain(islice(begun.source, 20))
    state = begun.state()
    again = resumable(data, 0)
    assert state is not None
    assert again.load(state)
    assert used + plain(iter(again.source)) == expected
