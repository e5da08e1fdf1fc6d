"""Seeding of loader processes for each micro-batch by (seed, epoch, rank, position) alone.

A dataset or collator may draw random numbers: augmentation, masked tokens. The generators of loader
processes cannot be saved with a checkpoint, and another number of processes distributes
micro-batches in another way. So generators are seeded for each micro-batch, and a run that resumes
inside an epoch draws the same numbers as a run without an interruption.
"""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data._utils import fetch

from dstrain.core.output import drop_what_cannot_be_written
from dstrain.core.seeds import derived_seed, seed_everything


@dataclass(frozen=True)
class MicroBatchSeed:
    """Values that determine the random numbers of a micro-batch.

    Attributes:
        seed: seed of the run's data.
        epoch: index of the epoch; negative if ``set_epoch`` was never called.
        rank: this rank.
        position: samples over all ranks before the micro-batch's chunk in the epoch.
    """

    seed: int
    epoch: int
    rank: int
    position: int

    def seed_generators(self) -> None:
        """Seed this process's generators (Python, numpy, torch) for the micro-batch."""
        of_epoch = derived_seed(self.seed, step=max(0, self.epoch), rank=self.rank)
        seed_everything(derived_seed(of_epoch, step=self.position, rank=0))


@contextlib.contextmanager
def host_generators_restored() -> Iterator[None]:
    """Restore this process's generators on the host after the body.

    Generators of a device are left alone, as a loader process cannot access the device.
    """
    import numpy as np
    import torch

    python, numbers, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        torch.set_rng_state(of_torch)


class SeededIndices(list[int]):
    """List of a micro-batch's dataset indices, with the seed of its random numbers."""

    def __init__(self, indices: Iterable[int], seed: MicroBatchSeed) -> None:
        """Make the list and store the seed.

        Args:
            indices: dataset indices of the samples.
            seed: seed of the micro-batch.
        """
        super().__init__(indices)
        self.seed = seed

    def __reduce__(self) -> Any:
        """Pickle the indices with their seed, to send them to a loader process."""
        return SeededIndices, (list(self), self.seed)


def prepare_worker(_: int) -> None:
    """Set up output, seeding and signals in a loader process (torch's ``worker_init_fn``)."""
    drop_what_cannot_be_written()  # a forked process has inherited this already
    fetch._MapDatasetFetcher = _SeededFetcher  # type: ignore[misc]
    # Schedulers and terminals send these signals to whole process groups. The rank still needs its
    # batches, to reach the step after which it saves and ends.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class _SeededFetcher(fetch._MapDatasetFetcher):
    """Fetcher that seeds the generators of a loader process before each micro-batch."""

    def fetch(self, possibly_batched_index: Any) -> Any:
        if isinstance(possibly_batched_index, SeededIndices):
            possibly_batched_index.seed.seed_generators()
        return super().fetch(possibly_batched_index)
