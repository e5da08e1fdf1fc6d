"""Datasets and loaders that tests of loaders, windows and streams share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset
from torch.utils.data import get_worker_info as torch_worker_info

from dstrain.data import (
    LoaderOptions,
    Topology,
    Window,
    build_loader,
    iterate,
)

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


def shapes(given: list[Window]) -> list[tuple[int, int, bool]]:
    return [(len(w.micro_batches), w.num_samples, w.ends_epoch) for w in given]
