"""Sending predictions from all ranks to rank 0, the only rank that needs them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from dstrain.core.errors import DataError, DstrainError, Problem, TrainingError
from dstrain.core.ranks import (
    PATIENCE,
    gather_objects,
    is_distributed,
    portable_error,
    raise_together,
    why_not_sent,
)
from dstrain.evaluation.arena import Scratch

T = TypeVar("T")

_FINE, _FAILED = 0, 1


class Transport:
    """Process group on the hosts in which ranks send predictions to rank 0.

    It is a separate group on the CPU with a long timeout: a metric may take longer than a timeout
    suitable for training, and rank 0's accelerator must not hold the predictions of other ranks.
    """

    def __init__(self) -> None:
        """Form the group; a collective of all ranks."""
        self.rank, self.world_size, self.group = 0, 1, None
        self._scratch = Scratch()
        if is_distributed():
            import torch.distributed as dist

            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            self.group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def close(self) -> None:
        """Destroy the group."""
        if self.group is not None:
            import torch.distributed as dist

            dist.destroy_process_group(self.group)
            self.group = None

    @property
    def is_main(self) -> bool:
        """Tell whether this is rank 0, which receives predictions."""
        return self.rank == 0

    def agree(self, mine: T) -> list[T]:
        """Gather a small value of every rank, on every rank."""
        return gather_objects(mine, group=self.group)

    def headers(self, numbers: Sequence[int], *, failed: bool) -> list[list[int]] | None:
        """Gather equally many numbers of every rank, on every rank; None if a rank has failed."""
        row = torch.tensor([_FAILED if failed else _FINE, *numbers], dtype=torch.int64)
        if self.world_size == 1:
            rows = [row]
        else:
            import torch.distributed as dist

            rows = [torch.empty_like(row) for _ in range(self.world_size)]
            dist.all_gather(rows, row, group=self.group)
        if any(int(row[0]) != _FINE for row in rows):
            return None
        return [row[1:].tolist() for row in rows]

    def to_main(
        self, tensor: torch.Tensor, shapes: Sequence[tuple[int, ...]]
    ) -> Iterator[torch.Tensor]:
        """Send a tensor to rank 0, which yields every rank's tensor in rank order.

        A yielded tensor of another rank is overwritten by the next one.

        Args:
            tensor: this rank's tensor, on the host.
            shapes: the shape of every rank's tensor.
        """
        if not self.is_main:
            if tensor.numel():
                import torch.distributed as dist

                dist.send(_as_bytes(tensor), dst=0, group=self.group)
            return
        yield tensor
        for rank in range(1, self.world_size):
            theirs = self._scratch.empty(shapes[rank], tensor.dtype)
            if theirs.numel():
                import torch.distributed as dist

                dist.recv(_as_bytes(theirs), src=rank, group=self.group)
            yield theirs

    def packed(self, objects: list[Any]) -> bytes | None:
        """Pickle objects for ``objects_to_main``, before its collective; None for a single rank.

        Raises:
            DataError: the objects cannot be pickled.
        """
        if self.world_size == 1:
            return None
        if why := why_not_sent(objects):
            raise DataError(
                Problem(
                    "predictions that are objects cannot be sent to rank 0",
                    why,
                    "return tensors, numbers, texts, lists and dicts, or name the output in "
                    "ignore_keys",
                )
            )
        return pickle.dumps(objects)

    def objects_to_main(self, mine: list[Any], packed: bytes | None) -> list[Any]:
        """Gather the entries of all ranks' lists in rank order on rank 0; return [] elsewhere."""
        if packed is None:
            return mine
        import torch.distributed as dist

        lists: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(packed, lists, dst=0, group=self.group)
        return [entry for theirs in lists or [] for entry in pickle.loads(theirs)]

    def from_main(self, make: Callable[[], T]) -> T:
        """Call ``make`` on rank 0 and return its value on every rank; raise its exception there."""
        value: Any = None
        failure: Exception | None = None
        if self.is_main:
            try:
                value = make()
            except Exception as error:
                failure = error
        if self.world_size > 1:
            import torch.distributed as dist

            sent = [_portable(value, failure)]
            dist.broadcast_object_list(sent, src=0, group=self.group)
            value, found = sent[0]
            failure = failure or found  # rank 0 raises the original, which has a traceback
        if failure is not None:
            raise failure
        return value

    def raise_together(self, error: Exception | None) -> None:
        """Raise this rank's error, or without one the first error of any rank; a collective."""
        raise_together(error, group=self.group)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """View a contiguous tensor of any dtype as bytes."""
    return tensor.reshape(-1).view(torch.uint8)


def _portable(value: Any, error: Exception | None) -> tuple[Any, Exception | None]:
    """Return a value and an error that can both be pickled; an error replaces other values."""
    if error is None and (why := why_not_sent(value)):
        error = TrainingError(
            Problem(
                f"compute_metrics returned {type(value).__name__} that cannot be sent to the ranks",
                why,
                "return a dict of names and numbers",
            )
        )
        value = None
    return value, portable_error(error)


def storage_error(error: OSError) -> DstrainError:
    """Return the error for predictions that cannot be written to disk."""
    return TrainingError(
        Problem(
            "the predictions of an evaluation cannot be written to disk",
            str(error),
            "free space in output_dir, keep more in memory (eval_memory_mb), keep less of the "
            "predictions (preprocess_logits_for_metrics), or set batch_eval_metrics",
        )
    )
