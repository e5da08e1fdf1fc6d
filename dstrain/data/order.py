"""Order of samples as a function of (seed, epoch) alone, independent of the number of ranks.

An epoch is cut into chunks of ``micro_batch x world_size`` samples, one chunk per micro-step. Each
rank takes its contiguous share of a chunk. Because chunks are cut from one global order, any
topology with the same global batch uses the same samples in the same optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dstrain.core.errors import DataError, Problem
from dstrain.data.worker_seeds import MicroBatchSeed, SeededIndices

# Samples that are sorted by length together. The number must not depend on topology or batch size,
# or a run could not resume inside an epoch with another one.
POOL_SAMPLES = 8192


@dataclass(frozen=True)
class Topology:
    """Distribution of samples over ranks and micro-steps, as seen from a rank.

    Attributes:
        micro_batch: samples per rank and micro-step.
        world_size: number of ranks.
        rank: this rank.
    """

    micro_batch: int
    world_size: int = 1
    rank: int = 0

    @property
    def chunk(self) -> int:
        """Return the samples over all ranks in one micro-step."""
        return self.micro_batch * self.world_size

    def share(self, num_samples: int) -> range:
        """Return the positions of this rank's samples in a chunk of ``num_samples`` samples.

        A full chunk has ``micro_batch`` samples for every rank; a short chunk, at the end of an
        epoch, is distributed as evenly as possible, and ranks may get none.
        """
        least, extra = divmod(num_samples, self.world_size)
        start = self.rank * least + min(self.rank, extra)
        return range(start, start + least + (self.rank < extra))


class EpochOrder:
    """Global order of a dataset's samples in each epoch."""

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int,
        shuffle: bool,
        lengths: Sequence[int] | torch.Tensor | None = None,
    ) -> None:
        """Set up the order.

        Args:
            num_samples: number of samples in the dataset.
            seed: seed of the shuffle.
            shuffle: whether to shuffle at all.
            lengths: lengths of the samples, to group similar ones; used only when shuffled.
        """
        self.num_samples = num_samples
        self._lengths = None if lengths is None else torch.as_tensor(lengths)
        self._seed = seed
        self._shuffle = shuffle

    def resized(self, num_samples: int) -> EpochOrder:
        """Return the order of a dataset with another number of samples.

        Raises:
            DataError: samples are grouped by lengths, which are not known for the new samples.
        """
        if self._lengths is not None:
            raise DataError(
                Problem(
                    f"set_epoch made {num_samples} samples of the dataset's {self.num_samples}",
                    "they are grouped by lengths, which were read at the start",
                    "leave group_by_length out, or let the dataset keep its length",
                )
            )
        return EpochOrder(num_samples, seed=self._seed, shuffle=self._shuffle)

    def indices(self, epoch: int) -> torch.Tensor:
        """Return the dataset indices in the order of ``epoch``: int64, shape (num_samples,)."""
        if not self._shuffle:
            return torch.arange(self.num_samples)
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(self.num_samples, generator=generator)
        return order if self._lengths is None else _grouped(order, self._lengths)


def _grouped(order: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Group samples of similar lengths in an order, as transformers' ``group_by_length`` does.

    Pools of the shuffled samples, a quarter of them or ``POOL_SAMPLES``, are each sorted from long
    to short. The longest sample of all comes first, so that a lack of memory shows at once.
    """
    pool_samples = max(1, min(len(order) // 4, POOL_SAMPLES))
    pool = torch.arange(len(order)) // pool_samples
    shortness = int(lengths.max()) - lengths[order]
    order = order[torch.argsort(pool * (int(lengths.max()) + 1) + shortness, stable=True)]
    longest = int(torch.argmax(lengths[order]))
    order[[0, longest]] = order[[longest, 0]]
    return order


class RankBatchSampler:
    """Torch batch sampler that yields a list of dataset indices per micro-step for this rank.

    All ranks yield the same number of lists. A rank whose share of the last chunk is empty yields
    the chunk's first sample as a padding batch, which must have no weight in the loss.
    """

    def __init__(self, order: EpochOrder, topology: Topology, *, drop_last: bool = False) -> None:
        """Set the position to the start of epoch 0.

        Args:
            order: global order of samples.
            topology: this rank among all ranks.
            drop_last: whether to drop a last chunk that does not fill all ranks.
        """
        self.order = order
        self.topology = topology
        self.drop_last = drop_last
        self.epoch = 0
        self.start = 0
        self.worker_seed = 0  # seed of loader processes; ``build_loader`` sets it

    def set_epoch(self, epoch: int, *, start: int = 0) -> None:
        """Set the epoch, and the number of its samples to skip because they were used."""
        self.epoch = epoch
        self.start = start

    def follow_length(self, num_samples: int) -> None:
        """Set the number of samples, for a dataset that changes its length with the epoch.

        Raises:
            DataError: samples are grouped by lengths, which are not known for the new samples.
        """
        if num_samples != self.order.num_samples:
            self.order = self.order.resized(num_samples)

    @property
    def remaining(self) -> int:
        """Return the number of samples, over all ranks, still to be used from ``start`` on."""
        left = max(0, self.order.num_samples - self.start)
        return left - left % self.topology.chunk if self.drop_last else left

    def whole(self) -> RankBatchSampler:
        """Return a copy of the sampler at the beginning of an epoch."""
        return RankBatchSampler(self.order, self.topology, drop_last=self.drop_last)

    def __len__(self) -> int:
        """Return the micro-steps from ``start`` to the end of the epoch."""
        return -(-self.remaining // self.topology.chunk)

    def chunk_samples(self, step: int) -> int:
        """Return the samples over all ranks in micro-step ``step``, counted from ``start``."""
        chunk = self.topology.chunk
        return min(chunk, self.remaining - step * chunk)

    def share_samples(self, step: int) -> int:
        """Return the samples of this rank in micro-step ``step``; 0 for a padding batch."""
        return len(self.topology.share(self.chunk_samples(step)))

    def _seed_at(self, position: int) -> MicroBatchSeed:
        """Return the seed of the micro-batch whose chunk begins at ``position`` from ``start``."""
        position += self.start
        return MicroBatchSeed(self.worker_seed, self.epoch, self.topology.rank, position)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield lists of indices, one per micro-step, each with the seed of its random numbers."""
        indices = self.order.indices(self.epoch)[self.start :]
        for step in range(len(self)):
            first = step * self.topology.chunk
            share = self.topology.share(self.chunk_samples(step))
            mine = (
                indices[first + share.start : first + share.stop]
                if share
                else indices[first : first + 1]
            )
            yield SeededIndices(mine.tolist(), self._seed_at(first))
