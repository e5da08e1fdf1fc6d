"""This process among the ranks, and the few collectives that need no engine."""

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
        """Tell whether this is rank 0 of all."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Tell whether this is the first rank of its machine."""
        return self.local_rank == 0

    @property
    def first_on_machine(self) -> int:
        """Return the first rank of this machine: launchers number its ranks in a row."""
        return self.rank - self.local_rank

    def on_machine(self) -> Ranks:
        """Return the rank facts of this process as if its machine were the only one."""
        local, number = self.local_rank, self.local_world_size
        return Ranks(local, local, number, number)


def launched_ranks() -> Ranks:
    """Return rank facts from the launcher's environment; one process when there is no launcher.

    Reads RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE (torchrun) or LOCAL_SIZE (deepspeed).

    Raises:
        ConfigError: many ranks without LOCAL_RANK: each would take the first device.
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
    """Return ascending ranks in words, with runs of them shortened: "ranks 0, 2-4095"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def is_distributed() -> bool:
    """Tell whether a process group of more than one rank is up."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """All-reduce ``tensor`` in place by summation; on a GPU it only enqueues work."""
    if is_distributed():
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


class PendingSum:
    """The sum of numbers over all ranks, on its way while other work goes on."""

    def __init__(self, number: float | Sequence[float], *, device: Any) -> None:
        """Start summing over the ranks, each of several numbers by itself; a collective of all."""
        import torch

        self._sum: Any = number
        self._work: Any = None
        if is_distributed() or isinstance(number, Sequence):
            self._sum = torch.tensor(number, dtype=torch.float32, device=device)
        if is_distributed():
            import torch.distributed as dist

            self._work = dist.all_reduce(self._sum, async_op=True)

    def get(self) -> Any:
        """Return the sum: one number on one rank as it was given, else a float32 tensor.

        On a GPU its stream waits for it and the host does not.
        """
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._sum


class HostSum:
    """Adds numbers up over ranks on their hosts, while the devices go on; for one run.

    Its process group is formed when it is first used, and lasts as long as the others do.
    """

    def __init__(self) -> None:
        """Form no group yet."""
        self._group: Any = None

    def begin(self, number: int) -> Callable[[], int]:
        """Start adding up; a collective of all ranks.

        Returns:
            what waits for the sum and returns it.
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
        """Give the group back, if there is one."""
        import torch.distributed as dist

        if self._group is not None:
            with contextlib.suppress(ValueError):  # all groups are gone where ranks meet anew
                dist.destroy_process_group(self._group)
        self._group = None


def barrier() -> None:
    """Wait until every rank is here."""
    if is_distributed():
        import torch.distributed as dist

        dist.barrier()


@dataclass(frozen=True)
class _Parcel:
    """A value as it is sent to other ranks: pickled, or in its place why it cannot be."""

    content: bytes = b""
    failure: str = ""

    @classmethod
    def of(cls, value: Any) -> _Parcel:
        """Pack a value; this comes before the collective, in which the others wait for it."""
        try:
            return cls(pickle.dumps(value))
        except Exception as error:  # a user's class may raise anything
            return cls(failure=f"{type(value).__name__}: {_in_words(error)}")

    def value(self, rank: int) -> Any:
        """Return what was packed.

        Raises:
            TrainingError: it could not be packed, or cannot be unpacked; on every rank that asks.
        """
        failure = self.failure
        if not failure:
            try:
                return pickle.loads(self.content)  # of a rank of this run
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
        TrainingError: a rank's value cannot be pickled; on every rank.
    """
    if not is_distributed():
        return [value]
    import torch.distributed as dist

    parcels: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parcels, _Parcel.of(value), group=group)
    return [parcel.value(rank) for rank, parcel in enumerate(parcels)]


def from_main(ranks: Ranks, ask: Callable[[], T]) -> T:
    """Call ``ask`` on the main rank alone and return its picklable value on every rank.

    Raises:
        DstrainError: on every rank, when it raised on the main one.
        Exception: on the main rank, what else it raised; the others are told in a TrainingError.
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
    value, told = gather_objects((value, told))[0]
    if told is not None:
        raise error or told
    return value


def broadcast_object(value: T, *, group: Any = None) -> T:
    """Return the main rank's picklable ``value`` on every rank.

    Raises:
        TrainingError: it cannot be pickled; on every rank.
    """
    if not is_distributed():
        return value
    import torch.distributed as dist

    parcels = [_Parcel.of(value) if dist.get_rank() == 0 else _Parcel()]
    dist.broadcast_object_list(parcels, src=0, group=group)
    return cast("T", parcels[0].value(0))


def send_to_main(data: bytes, *, group: Any) -> list[bytes] | None:
    """Send bytes of every rank to the main rank; a collective of all ranks in ``group``.

    Each message takes its own size: a gather would pad all of them to the largest one.

    Args:
        data: the message; nothing is sent where it is empty.
        group: a process group of all ranks for tensors in host memory.

    Returns:
        the messages in rank order on the main rank; None on all others.
    """
    if not is_distributed():
        return [data]
    import torch
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    sizes = torch.zeros(world_size, dtype=torch.int64)
    sizes[rank] = len(data)
    dist.all_reduce(sizes, group=group)
    if rank:
        if data:
            dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0, group=group)
        return None
    received = [data]
    for sender, size in enumerate(sizes.tolist()[1:], start=1):
        message = torch.empty(size, dtype=torch.uint8)
        if size:
            dist.recv(message, sender, group=group)
        received.append(message.numpy().tobytes())
    return received


def portable_error(error: Exception | None) -> Exception | None:
    """Return an error that another rank can raise: this one, or one that says what it says."""
    if error is None or not why_not_sent(error):
        return error
    return TrainingError(Problem(f"{type(error).__name__} on another rank", str(error)))


def why_not_sent(value: Any) -> str:
    """Say why a value cannot be sent to another rank; "" where it can be."""
    try:
        pickle.loads(pickle.dumps(value))
    except Exception as error:  # a user's class may raise anything
        return str(error) or type(error).__name__
    return ""


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def all_or_none(*, group: Any = None) -> Iterator[None]:
    """Run the body on every rank; when it fails for one, raise that user error on all.

    Without it, the ranks that saw nothing wrong would wait in the next collective until the
    process group times out. A rank must not leave the body early where others wait in a
    collective inside it.
    """
    error: DstrainError | None = None
    try:
        yield
    except DstrainError as caught:
        error = caught
    for found in gather_objects(portable_error(error), group=group):
        if found is not None:
            raise error or found


def require_equal(what: str, value: Any, error: type[DstrainError]) -> None:
    """Check that all ranks hold the same small value, before they rely on it.

    Raises:
        error: naming the first rank that differs and both values; on every rank.
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
