"""Datasets that the user has split by rank, which are refused, and data that only looks split."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from tests.distributed.split_data import (
    EVEN,
    SAMPLES,
    SHORT,
    UNEVEN,
    Part,
    check_epochs,
    check_evaluations,
    generate,
    rows,
    trainer_of,
)

WORLDS = [pytest.param(n, marks=pytest.mark.ranks(n, timeout=200)) for n in (2, 3)]


def hub_dataset(rank: int, world_size: int, size: int) -> Any:
    from datasets import Dataset as HubDataset

    whole = HubDataset.from_list(rows(list(range(size))))
    return whole.shard(num_shards=world_size, index=rank)


def hub_nodes(rank: int, world_size: int, size: int) -> Any:
    from datasets import Dataset as HubDataset
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(HubDataset.from_list(rows(list(range(size)))), rank, world_size)


DATASETS: dict[str, Callable[[int, int, int], Any]] = {
    "shard": hub_dataset,
    "split_dataset_by_node": hub_nodes,
    "a list": lambda *part: rows(Part(*part).numbers),
}


@pytest.mark.parametrize("size", [EVEN, UNEVEN])
@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize("world", WORLDS)
def test_a_dataset_that_is_split_is_refused(
    world: int, kind: str, size: int, tmp_path: Path, rank: int
) -> None:
    """To train, to evaluate and to predict with; on all ranks, with what to do instead."""
    from dstrain.core.errors import DataError

    part = DATASETS[kind](rank, world, size)
    trainer = trainer_of(tmp_path, part)
    for use in (trainer.train, lambda: trainer.evaluate(part), lambda: trainer.predict(part)):
        with pytest.raises(DataError, match="is not the same on all ranks") as caught:
            use()
        assert "pass the whole dataset on every rank" in str(caught.value)
    if hasattr(part, "to_iterable_dataset"):
        stream = trainer_of(tmp_path, part.to_iterable_dataset(), max_steps=-(-size // world))
        stream.train()  # as the message says
        check_epochs(stream, size, 1)


class SameEnds(Dataset[Any]):
    """Split by rank; the first, the middle and the last row are the same on all ranks."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.numbers = list(range(rank, 33 * world_size, world_size))
        for place in (0, 16, 32):
            self.numbers[place] = 0
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Any:
        self.read.append(place)
        random.random()
        return rows([self.numbers[place] % len(SAMPLES)])[0]


@pytest.mark.ranks(2)
def test_a_split_between_equal_rows_is_refused(tmp_path: Path, rank: int) -> None:
    """Three rows that are the same say little."""
    from dstrain.core.errors import DataError

    part = SameEnds(rank, 2)
    trainer = trainer_of(tmp_path, part)
    for use in (trainer.train, lambda: trainer.evaluate(part), lambda: trainer.predict(part)):
        with pytest.raises(DataError, match="is not the same on all ranks") as caught:
            use()
        assert "pass the whole dataset on every rank" in str(caught.value)


@pytest.mark.ranks(2)
def test_rows_that_are_looked_at_are_few_and_leave_no_trace(rank: int) -> None:
    """From the first to the last, once where they are the same; random numbers are put back."""
    from dstrain.core.seeds import random_state, seed_rank
    from dstrain.data import LoaderOptions, Topology, build_loader, detect_split

    seed_rank(1, step=0, rank=rank)
    data = SameEnds(0, 1)
    loader = build_loader(data, Topology(2, 2, rank), list, LoaderOptions(), seed=1, shuffle=False)
    before = random_state()
    detect_split(loader, what="the data")
    assert len(data.read) == 16
    assert (data.read[0], data.read[-1]) == (0, 32)
    assert {b - a for a, b in pairwise(data.read)} == {2, 3}
    assert random_state()["python"] == before["python"]


class Augmented(Dataset[Any]):
    """The same samples on all ranks, with noise that is another on each; or of nothing else."""

    def __init__(self, draw: str, *, label: bool) -> None:
        self.draw, self.label = draw, label
        self.own = np.random.default_rng()

    def __len__(self) -> int:
        return EVEN

    def __getitem__(self, index: int) -> Any:
        noise: Any = {
            "torch": lambda: torch.randn(3),
            "numpy": lambda: np.random.rand(3),
            "python": lambda: [random.random() for _ in range(3)],
            "its own": lambda: self.own.normal(size=3),
            "crops of tokens": lambda: SAMPLES[index]["input_ids"][: self.own.integers(2, 4)],
        }[self.draw]()
        return {"noise": noise, **(rows([index])[0] if self.label else {})}


class AugmentedStream(IterableDataset[Any]):
    def __init__(self, dataset: Augmented) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return (self.dataset[i] for i in range(len(self.dataset)))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("draw", ["torch", "numpy", "python", "its own", "crops of tokens"])
def test_noise_is_no_split(draw: str, label: bool, rank: int) -> None:
    """Samples that differ between ranks, and from one reading to the next, may be the same data."""
    from dstrain.core.seeds import random_state, seed_rank
    from dstrain.data import LoaderOptions, Topology, build_loader, detect_split, num_shares

    seed_rank(1, step=0, rank=rank)
    dataset = Augmented(draw, label=label)
    for data in (dataset, AugmentedStream(dataset)):
        loader = build_loader(
            data, Topology(2, 2, rank), list, LoaderOptions(), seed=1, shuffle=False
        )
        before = random_state()
        detect_split(loader, what="the data")
        after = random_state()
        assert num_shares(loader) == 1
        assert torch.equal(before["torch"], after["torch"])
        assert before["python"] == after["python"]
        assert sum(len(batch) for batch in loader) == EVEN // 2


@pytest.mark.ranks(2)
def test_what_differs_between_machines_is_no_split(rank: int) -> None:
    """Places of files, and the last bits of floating-point numbers."""
    from dstrain.data import LoaderOptions, Topology, build_loader, detect_split, num_shares

    wave = torch.linspace(0, 1, 50)
    data = [{"path": f"/disk{rank}/{i}", "wave": wave * i * (1 + 1e-7 * rank)} for i in range(9)]
    for source in (data, AugmentedStream(data)):  # type: ignore[arg-type]
        loader = build_loader(
            source, Topology(2, 2, rank), list, LoaderOptions(), seed=1, shuffle=False
        )
        detect_split(loader, what="the data")
        assert num_shares(loader) == 1


@pytest.mark.ranks(2)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_whole_stream_is_read_once(num_workers: int, tmp_path: Path, rank: int) -> None:
    """Comparing its first samples costs none of them; every sample is trained once."""
    stream = Part(0, 1, UNEVEN)
    trainer = trainer_of(
        tmp_path, stream, max_steps=2 * -(-UNEVEN // 2), dataloader_num_workers=num_workers,
        evaluation=Part(0, 1, UNEVEN), eval_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    check_epochs(trainer, UNEVEN, 2)
    check_evaluations(trainer, UNEVEN, 2)


@pytest.mark.ranks(2)
def test_a_generator_loses_no_sample(tmp_path: Path) -> None:
    """It can be read but once, and is looked at first all the same."""
    trainer = trainer_of(tmp_path, generate(list(range(SHORT))), max_steps=4)
    trainer.train()
    check_epochs(trainer, SHORT, 1)
