"""Synchronization of ranks in training on data whose length not all ranks know.

A rank may run out of such data first, and would go on to an evaluation or the next epoch while
other ranks wait for it in a backward pass. So ranks tell each other whether they have another
micro-batch, in a process group on their hosts, apart from training's collectives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch

from dstrain.core.errors import DataError, Problem
from dstrain.core.ranks import PATIENCE, gather_objects
from dstrain.data.comparison.stream_watch import StreamWatch

Step = tuple[Any, int]  # a micro-batch, and its samples over all ranks

# All ranks begin an exchange before the optimizer step after which they close, so its end is near,
# unless a rank is lost.
_LAST_EXCHANGE = timedelta(seconds=10)


class LocalSteps:
    """Micro-batches of a single process, or of data whose length all ranks know."""

    def __init__(self, steps: Iterator[Step]) -> None:
        """Set up for an epoch.

        Args:
            steps: this rank's micro-batches.
        """
        self._steps = steps

    def fetch(self) -> Step | None:
        """Return the next micro-batch; None at the end."""
        return next(self._steps, None)

    def check_end(self) -> None:
        """Check that ranks end together; called before a shorter window, and after the last.

        Does nothing here.
        """

    def close(self) -> None:
        """Release the resources of this epoch; there are none here."""


class _ExchangingSteps(LocalSteps):
    """Micro-batches of ranks that exchange, in a process group on the hosts, what each has left."""

    def __init__(self, steps: Iterator[Step]) -> None:
        """Form the group; a collective of all ranks."""
        import torch.distributed as dist

        super().__init__(steps)
        self._world_size = dist.get_world_size()
        self._group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._latest: Any = None  # the exchange begun last
        self._failure: Exception | None = None

    def _next(self) -> Step | None:
        """Return the next micro-batch, or None; keep an error until all ranks know of it."""
        try:
            return next(self._steps, None)
        except Exception as error:  # a user's dataset may raise anything
            self._failure = error
            return None

    def _begin_exchange(self, have: bool, more: Sequence[int] = ()) -> tuple[Any, torch.Tensor]:
        """Start summing over ranks: ranks with a micro-batch, failed ranks, numbers in ``more``."""
        import torch.distributed as dist

        told = torch.tensor([int(have), int(self._failure is not None), *more])
        self._latest = dist.all_reduce(told, group=self._group, async_op=True)
        return self._latest, told

    def _end_exchange(self, exchange: tuple[Any, torch.Tensor]) -> tuple[int, list[int]]:
        """Wait for the sums; return the number of ranks with a micro-batch, and sums of ``more``.

        Raises:
            Exception: this rank's data has failed.
            DataError: another rank's data has failed.
        """
        work, told = exchange
        work.wait()
        number, num_failed, *sums = told.tolist()
        if num_failed:
            self._raise_on_all_ranks()
        return number, sums

    def _raise_on_all_ranks(self) -> None:
        mine = self._failure
        said = None if mine is None else f"{type(mine).__name__}: {mine}"
        every = gather_objects(said, group=self._group)
        if mine is not None:
            raise mine
        rank, text = next((rank, text) for rank, text in enumerate(every) if text is not None)
        raise DataError(Problem(f"reading the training data failed on rank {rank}", text))

    def close(self) -> None:
        """Destroy the process group once the latest exchange has ended.

        If that still waits for a lost rank after some seconds, the group stays: gloo would wait for
        the rank when the group is destroyed, for up to ``PATIENCE``.
        """
        import torch.distributed as dist

        if self._latest is not None:
            with contextlib.suppress(RuntimeError):  # gloo's time-out, or a lost connection
                self._latest.wait(_LAST_EXCHANGE)
            if not self._latest.is_completed():
                return
        with contextlib.suppress(ValueError):  # process groups were rebuilt, without this one
            dist.destroy_process_group(self._group)


class SharedStreamSteps(_ExchangingSteps):
    """Shares of a stream that all ranks read alike, with a check that they end together.

    The exchange about a micro-batch is completed only when the next one is fetched, so that no rank
    waits for another. Ranks that end at different places notice it between two steps, and all raise
    the same error; so do ranks that read different samples, while samples are compared.
    """

    def __init__(self, steps: Iterator[Step], *, watch: StreamWatch | None = None) -> None:
        """Form the group; a collective of all ranks.

        Args:
            steps: this rank's micro-batches, in as many steps as those of the other ranks.
            watch: compares the samples of the stream between ranks; None for no comparison.
        """
        super().__init__(steps)
        self._watch = watch
        self._pending: tuple[Any, torch.Tensor] | None = None

    def fetch(self) -> Step | None:
        """Return the next micro-batch; None at the end, or where reading has failed.

        Raises:
            DataError: streams do not end together, or differ.
        """
        self.check_end()
        step = self._next()
        more = [] if self._watch is None else self._watch.bits()
        self._pending = self._begin_exchange(step is not None, more)
        return step

    def check_end(self) -> None:
        """Complete the exchange about the micro-batch fetched last.

        Raises:
            DataError: only some ranks have it, or ranks read different samples; on all ranks.
        """
        if self._pending is None:
            return
        exchange, self._pending = self._pending, None
        number, sums = self._end_exchange(exchange)
        if number not in (0, self._world_size):
            raise stream_ends_differ(number, self._world_size)
        if self._watch is not None and sums:
            ended = number == 0
            self._watch.check_sums(
                sums, world_size=self._world_size, ended=ended, group=self._group
            )


class RankPartSteps(_ExchangingSteps):
    """Micro-batches of ranks that each have a part of the data, until the longest part ends.

    A rank whose part is used up yields padding batches, which have no weight in the loss.
    """

    def __init__(
        self,
        steps: Iterator[Step],
        *,
        padding_of: Callable[[Any], Any],
        first_padding: Callable[[], Any | None],
        num_samples: int,
        drop_last: bool = False,
    ) -> None:
        """Form the group; a collective of all ranks.

        Args:
            steps: this rank's micro-batches.
            padding_of: makes a padding batch from a micro-batch.
            first_padding: makes a padding batch for a rank whose part was used up before the first
                step; returns None where the part is empty.
            num_samples: samples over all ranks in the micro-step of a padding batch.
            drop_last: end when the first rank has no micro-batch left.
        """
        super().__init__(steps)
        self._padding_of, self._first_padding, self._drop_last = (
            padding_of,
            first_padding,
            drop_last,
        )
        self._num_samples = num_samples
        self._last: Any = None

    def fetch(self) -> Step | None:
        """Return the next micro-batch or padding batch; None when no rank has one.

        Raises:
            DataError: a rank has no sample at all; raised on all ranks.
        """
        is_first = self._last is None
        step = self._next()
        number, _ = self._end_exchange(self._begin_exchange(step is not None))
        if number == 0 or (self._drop_last and number < self._world_size):
            return None
        if step is not None:
            self._last = self._padding_of(step[0])  # before anyone changes it
        if is_first and number < self._world_size:
            self._find_padding()
        return (self._padding_of(self._last), self._num_samples) if step is None else step

    def _find_padding(self) -> None:
        """Make a padding batch on ranks without a micro-batch at the first step; a collective."""
        if self._last is None:
            self._last = self._first_padding()
        number, _ = self._end_exchange(self._begin_exchange(self._last is not None))
        if number < self._world_size:
            raise DataError(
                Problem(
                    f"only {number} of {self._world_size} ranks have training data",
                    "a rank without a sample cannot take part in the forward passes of the others",
                    "give every rank at least one sample, or the same data on all ranks",
                )
            )


def stream_ends_differ(number: int, world_size: int) -> DataError:
    """Return the error for a stream that goes on for only ``number`` ranks, though all read it."""
    return DataError(
        Problem(
            f"the stream ended on {world_size - number} of {world_size} ranks, and goes on on the "
            "other ranks",
            "all ranks must read the same samples; the streams began alike, or could not be "
            "compared",
            "give all ranks the same stream; or split it with split_dataset_by_node, which says "
            "so; dispatch_batches=True lets one rank read for all",
        )
    )
