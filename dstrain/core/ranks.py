"""Who this process is among the ranks, and the few collectives that need no engine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from dstrain.core.errors import DstrainError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Rank facts of one process.

    Attributes:
        rank: index among all processes, 0 to world_size - 1.
        local_rank: index among the processes of this machine.
        world_size: number of processes over all machines.
        local_world_size: number of processes on this machine.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0 of all."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first rank of its machine."""
        return self.local_rank == 0


def launched_ranks() -> Ranks:
    """Rank facts from the launcher's environment; one process when there is no launcher.

    Reads RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE (torchrun) or LOCAL_SIZE (deepspeed).
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return Ranks(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        world_size=world_size,
        local_world_size=int(local_size) if local_size else world_size,
    )


def is_distributed() -> bool:
    """Whether a process group of more than one rank is up."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """All-reduce ``tensor`` in place by summation; on a GPU it only enqueues work."""
    if is_distributed():
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait until every rank is here."""
    if is_distributed():
        import torch.distributed as dist

        dist.barrier()


def broadcast_object(value: T, *, source: int = 0) -> T:
    """The picklable ``value`` of rank ``source``, on every rank."""
    if not is_distributed():
        return value
    import torch.distributed as dist

    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """The picklable ``value`` of every rank, in rank order, on every rank."""
    if not is_distributed():
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Run the body on every rank; when it fails for one, raise that user error on all.

    Without it, the ranks that saw nothing wrong would wait in the next collective until the
    process group times out. The body must not contain collectives of its own.
    """
    error: DstrainError | None = None
    try:
        yield
    except DstrainError as caught:
        error = caught
    for found in gather_objects(error):
        if found is not None:
            raise error or found


@contextlib.contextmanager
def main_first(ranks: Ranks, *, per_node: bool = True) -> Iterator[None]:
    """Run the body on the main rank before the others, so that they find what it has cached.

    A user error of the main rank is raised on every rank.

    Args:
        ranks: facts of this process.
        per_node: one main rank per machine (for machines that do not share a disk).
    """
    main = ranks.is_local_main if per_node else ranks.is_main
    if main:
        with all_or_none():
            yield
    else:
        with all_or_none():
            pass
        yield
