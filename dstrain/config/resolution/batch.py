"""Batch arithmetic: samples per rank, accumulation, ranks, and the unit of ``split_batches``."""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.arguments import TrainingArguments


@dataclass(frozen=True)
class BatchUnit:
    """Unit of batch sizes in the arguments: samples of one rank, or of all ranks.

    Attributes:
        num_ranks: ranks whose samples a batch size counts: 1, or with ``split_batches`` all.
    """

    num_ranks: int = 1

    def per_rank(self, size: int) -> int:
        """Return the samples of one rank in a batch of this size; if ranks differ, the most."""
        return -(-size // self.num_ranks)

    def as_argument(self, per_rank: int) -> int:
        """Return the batch size in this unit for a number of samples per rank."""
        return per_rank * self.num_ranks

    def splits_evenly(self, size: int) -> bool:
        """Tell whether all ranks get the same number of samples of a batch of this size."""
        return size % self.num_ranks == 0


def batch_unit(arguments: TrainingArguments, world_size: int) -> BatchUnit:
    """Return the unit of the batch sizes in these arguments."""
    return BatchUnit(world_size if arguments.splits_batches else 1)


def eval_micro_batch(arguments: TrainingArguments, world_size: int) -> int:
    """Return the samples per rank in one forward pass of an evaluation."""
    return batch_unit(arguments, world_size).per_rank(arguments.per_device_eval_batch_size)


def global_batch(micro_batch: int, accumulation: int, world_size: int) -> int:
    """Return the samples of all ranks in a full optimizer step."""
    return micro_batch * accumulation * world_size


def accumulation_for(total: int, micro_batch: int, world_size: int) -> int | None:
    """Return the micro-batches per rank in a global batch; None if that is no whole number."""
    count, rest = divmod(total, micro_batch * world_size)
    return count if count and not rest else None


def smaller(micro_batch: int, accumulation: int) -> tuple[int, int] | None:
    """Return the largest micro-batch of at most half the size, and its accumulation.

    Their product does not change. None if the micro-batch has one sample already.
    """
    total = micro_batch * accumulation
    for size in range(micro_batch // 2, 0, -1):
        if total % size == 0:
            return size, total // size
    return None
