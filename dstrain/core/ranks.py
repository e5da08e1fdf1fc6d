"""Rank facts of this process, and collectives that need no DeepSpeed engine."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from dstrain.core.errors import ConfigError, DstrainError, Problem, TrainingError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """Rank facts of a process.

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
        """Tell whether this is rank 0 of all processes."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Tell whether this is the first rank of its machine."""
        return self.local_rank == 0

    @property
    def first_on_machine(self) -> int:
        """Return the first rank of this machine: launchers number a machine's ranks in a row."""
        return self.rank - self.local_rank

    def on_machine(self) -> Ranks:
        """Return the rank facts of this process counted over this machine only."""
        local, number = self.local_rank, self.local_world_size
        return Ranks(local, local, number, number)


def launched_ranks() -> Ranks:
    """Return rank facts from the launcher's environment; a single process without a launcher.

    Reads RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE (torchrun) or LOCAL_SIZE (deepspeed).

    Raises:
        ConfigError: there are several ranks and LOCAL_RANK is not set, so that each would take the
            first device.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            Problem(
                f"WORLD_SIZE={world_size} without LOCAL_RANK",
                "every rank would drive the first device of its machine",
                "start with deepspeed or torchrun, or export LOCAL_RANK (SLURM_LOCALID, "
                "OMPI_COMM_WORLD_LOCAL_RANK)",
            )
        )
    local_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return Ranks(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        world_size=world_size,
        local_world_size=int(local_size) if local_size else world_size,
    )


def named_ranks(ranks: Sequence[int]) -> str:
    """Return ascending ranks in words, consecutive ranks as a range: "ranks 0, 2-4095"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def is_distributed() -> bool:
    """Tell whether a process group of more than one rank is initialized."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum ``tensor`` over ranks in place (all-reduce); on a GPU only enqueue the work."""
    if is_distributed():
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


class PendingSum:
    """An asynchronous sum of numbers over all ranks."""

    def __init__(self, number: float | Sequence[float], *, device: Any) -> None:
        """Start an all-reduce of a number, or of several elementwise; a collective of all ranks."""
        import torch

        self._sum: Any = number
        self._work: Any = None
        if is_distributed() or isinstance(number, Sequence):
            self._sum = torch.tensor(number, dtype=torch.float32, device=device)
        if is_distributed():
            import torch.distributed as dist

            self._work = dist.all_reduce(self._sum, async_op=True)

    def get(self) -> Any:
        """Return the sum as a float32 tensor; on one rank a single number is returned unchanged.

        On a GPU the stream waits for the sum, not the host.
        """
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._sum


class HostSum:
    """Sums numbers over ranks on their hosts, without waiting for devices; for one run.

    Its process group is formed at the first sum, and is valid until process groups are rebuilt.
    """

    def __init__(self) -> None:
        """Set up without a process group."""
        self._group: Any = None

    def begin(self, number: int) -> Callable[[], int]:
        """Start summing; a collective of all ranks.

        Returns:
            A function that waits for the sum and returns it.
        """
        if not is_distributed():
            return lambda: int(number)
        import torch
        import torch.distributed as dist

        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        total = torch.tensor(int(number))
        work = dist.all_reduce(total, group=self._group, async_op=True)

        def wait() -> int:
            work.wait()
            return int(total)

        return wait

    def close(self) -> None:
        """Destroy the process group, if one was formed."""
        import torch.distributed as dist

        if self._group is not None:
            with contextlib.suppress(ValueError):  # process groups were rebuilt, without this one
                dist.destroy_process_group(self._group)
        self._group = None


def barrier() -> None:
    """Wait until every rank has called this function."""
    if is_distributed():
        import torch.distributed as dist

        dist.barrier()


@dataclass(frozen=True)
class _Parcel:
    """A pickled value to send to other ranks, or the reason why it cannot be pickled."""

    content: bytes = b""
    failure: str = ""

    @classmethod
    def of(cls, value: Any) -> _Parcel:
        """Pickle a value; a failure is kept, as the other ranks already wait in a collective."""
        try:
            return cls(pickle.dumps(value))
        except Exception as error:  # a user's class may raise anything
            return cls(failure=f"{type(value).__name__}: {_in_words(error)}")

    def value(self, rank: int) -> Any:
        """Unpickle and return the value.

        Raises:
            TrainingError: the value could not be pickled on rank ``rank``, or cannot be unpickled
                here.
        """
        failure = self.failure
        if not failure:
            try:
                return pickle.loads(self.content)  # trusted: written by a rank of this run
            except Exception as error:
                failure = _in_words(error)
        raise TrainingError(
            Problem(
                f"a value of rank {rank} cannot be sent to the other ranks",
                failure,
                "use plain values: numbers, texts, lists, dicts and classes of modules",
            )
        )


def gather_objects(value: T, *, group: Any = None) -> list[T]:
    """Return the picklable ``value`` of every rank, in rank order, on every rank.

    Raises:
        TrainingError: a rank's value cannot be pickled; raised on every rank.
    """
    if not is_distributed():
        return [value]
    import torch.distributed as dist

    parcels: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parcels, _Parcel.of(value), group=group)
    return [parcel.value(rank) for rank, parcel in enumerate(parcels)]


def gather_failures(failure: T | None, *, group: Any = None) -> list[T]:
    """Return what failed on any rank, in rank order, on every rank; empty where nothing did.

    Ranks exchange a single number unless one of them failed.

    Args:
        failure: picklable description of what failed on this rank; None where nothing did.
        group: a process group of all ranks.
    """
    if not on_any_rank(failure is not None, group=group):
        return []
    return [found for found in gather_objects(failure, group=group) if found is not None]


def on_any_rank(flag: bool, *, group: Any = None) -> bool:
    """Tell whether a flag is true on any rank; a collective of a single number."""
    if not is_distributed():
        return flag
    import torch
    import torch.distributed as dist

    on_host = "gloo" in dist.get_backend(group)
    device = torch.device("cpu") if on_host else torch.accelerator.current_accelerator()
    raised = torch.tensor(int(flag), device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX, group=group)
    return bool(raised)


def from_main(ranks: Ranks, ask: Callable[[], T]) -> T:
    """Call ``ask`` on the main rank alone and return its picklable value on every rank.

    Raises:
        DstrainError: ``ask`` raised it on the main rank; raised on every rank.
        Exception: ``ask`` raised another exception; the main rank raises it as it is, and the other
            ranks a TrainingError with its text.
    """
    value: Any = None
    error: Exception | None = None
    if ranks.is_main:
        try:
            value = ask()
        except Exception as caught:
            error = caught
    told: Any = portable_error(error)
    if error is not None and not isinstance(error, DstrainError):
        told = TrainingError(Problem(f"rank 0 failed: {_in_words(error)}"))
    value, told = broadcast_object((value, told))
    if told is not None:
        raise error or told
    return value


def broadcast_object(value: T, *, group: Any = None) -> T:
    """Return the main rank's picklable ``value`` on every rank.

    Raises:
        TrainingError: the value cannot be pickled; raised on every rank.
    """
    if not is_distributed():
        return value
    import torch.distributed as dist

    parcels = [_Parcel.of(value) if dist.get_rank() == 0 else _Parcel()]
    dist.broadcast_object_list(parcels, src=0, group=group)
    return cast("T", parcels[0].value(0))


def portable_error(error: Exception | None) -> Exception | None:
    """Return ``error`` if it can be pickled, else a TrainingError with its class name and text."""
    if error is None or not why_not_sent(error):
        return error
    return TrainingError(Problem(f"{type(error).__name__} on another rank", str(error)))


def why_not_sent(value: Any) -> str:
    """Return the reason why a value cannot be pickled for another rank; "" where it can be."""
    try:
        pickle.loads(pickle.dumps(value))
    except Exception as error:  # a user's class may raise anything
        return str(error) or type(error).__name__
    return ""


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def all_or_none(*, group: Any = None) -> Iterator[None]:
    """Run the body on every rank; when it raises a user error on one rank, raise that on all.

    Without this, ranks without an error would wait in the next collective until the process group
    times out. A rank must not leave the body early where others wait in a collective inside it.
    """
    error: DstrainError | None = None
    try:
        yield
    except DstrainError as caught:
        error = caught
    raise_together(error, group=group)


def raise_together(error: Exception | None, *, group: Any = None) -> None:
    """Raise this rank's error, or without one the first error of any rank; a collective."""
    if failures := gather_failures(portable_error(error), group=group):
        raise error or failures[0]


def require_equal(what: str, value: Any, error: type[DstrainError]) -> None:
    """Check that all ranks hold the same small value, before they rely on it.

    Raises:
        error: a rank's value differs; the message, alike on every rank, names the first such rank
            and both values.
    """
    values = gather_objects(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise error(
                Problem(
                    f"{what} differs between ranks",
                    f"rank 0 has {values[0]!r}, rank {rank} has {other!r}",
                    "give every machine the same data, files and versions",
                )
            )
