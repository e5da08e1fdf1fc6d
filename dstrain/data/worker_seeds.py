"""Random numbers in loader processes: a function of (seed, epoch, rank, position) alone.

A dataset or collator may draw them: augmentation, masked tokens. The generators of a loader
process cannot be saved with a checkpoint, and another number of processes deals micro-batches out
in another way. So each micro-batch is made with generators that are seeded for it, and a run that
goes on from inside an epoch draws what the run that never stopped would have drawn.
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
    """The facts that the random numbers of a micro-batch follow from.

    Attributes:
        seed: of the run's data.
        epoch: number of the epoch; negative where nobody has said it.
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
    """Restore the host's generators of this process after the body, as if it had drawn nothing.

    Those of a device are left alone, which a loader process cannot ask.
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
    """The dataset indices of a micro-batch, and the seed of its random numbers."""

    def __init__(self, indices: Iterable[int], seed: MicroBatchSeed) -> None:
        """Keep the seed beside the list.

        Args: the indices, the seed.
        """
        super().__init__(indices)
        self.seed = seed

    def __reduce__(self) -> Any:
        """Pickle the indices with their seed, on the way to a loader process."""
        return SeededIndices, (list(self), self.seed)


def prepare_worker(_: int) -> None:
    """Prepare a loader process (torch's ``worker_init_fn``)."""
    drop_what_cannot_be_written()  # a process that was forked does so already
    fetch._MapDatasetFetcher = _SeededFetcher  # type: ignore[misc]
    # Schedulers and terminals send these to whole process groups. The rank still needs its batches,
    # to reach the step after which it saves and ends.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class _SeededFetcher(fetch._MapDatasetFetcher):
    """A fetcher that seeds the generators of a loader process before each micro-batch."""

    def fetch(self, possibly_batched_index: Any) -> Any:
        if isinstance(possibly_batched_index, SeededIndices):
            possibly_batched_index.seed.seed_generators()
        return super().fetch(possibly_batched_index)
