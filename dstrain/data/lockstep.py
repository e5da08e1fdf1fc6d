"""Keeping ranks in step during training: no rank waits for another that has no data left.

Where data has no length that all ranks know, a rank may run out of it first, and would go to an
evaluation or the next epoch while other ranks wait for it in a backward pass. Ranks tell each other
on their hosts, beside training's own collectives, whether they have one more micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from dstrain.core.errors import DataError, Problem
from dstrain.core.ranks import PATIENCE, gather_objects
from dstrain.data.comparison.stream_watch import StreamWatch

Step = tuple[Any, int]  # a micro-batch, and its samples over all ranks


class LocalSteps:
    """Micro-batches of one rank alone, or of data whose length all ranks know."""

    def __init__(self, steps: Iterator[Step]) -> None:
        """Set up for one epoch.

        Args: this rank's micro-batches.
        """
        self._steps = steps

    def fetch(self) -> Step | None:
        """Return the next micro-batch; None at the end."""
        return next(self._steps, None)

    def check_end(self) -> None:
        """Check that ranks end together; called before a shorter window, and after the last."""

    def close(self) -> None:
        """Release what was taken for this epoch."""


class _ExchangingSteps(LocalSteps):
    """Micro-batches of ranks that tell each other, in a host process group, what each has."""

    def __init__(self, steps: Iterator[Step]) -> None:
        """Form the group; a collective of all ranks."""
        import torch.distributed as dist

        super().__init__(steps)
        self._world_size = dist.get_world_size()
        self._group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._failure: Exception | None = None

    def _next(self) -> Step | None:
        """Return the next micro-batch; an error of the data is kept until all ranks know of it."""
        try:
            return next(self._steps, None)
        except Exception as error:  # of a dataset of the user's own, anything
            self._failure = error
            return None

    def _begin_exchange(self, have: bool, more: Sequence[int] = ()) -> tuple[Any, torch.Tensor]:
        """Start summing over ranks: who has one more, who has failed, the numbers in ``more``."""
        import torch.distributed as dist

        told = torch.tensor([int(have), int(self._failure is not None), *more])
        return dist.all_reduce(told, group=self._group, async_op=True), told

    def _end_exchange(self, exchange: tuple[Any, torch.Tensor]) -> tuple[int, list[int]]:
        """Return how many ranks have one more micro-batch, and the sums of ``more``.

        Raises:
            Exception: on a rank whose data has failed.
            DataError: on the others.
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
        """Destroy the process group."""
        import torch.distributed as dist

        with contextlib.suppress(ValueError):  # all groups are gone where ranks meet anew
            dist.destroy_process_group(self._group)


class SharedStreamSteps(_ExchangingSteps):
    """Shares of a stream that all ranks read alike: no rank is waited for, but the end is checked.

    What a rank tells of a micro-batch is looked at when it asks for the next one. So ranks that end
    at different places find out between two steps, and each raises the same error; so do ranks that
    read other samples, while these are compared.
    """

    def __init__(self, steps: Iterator[Step], *, watch: StreamWatch | None = None) -> None:
        """Form the group; a collective of all ranks.

        Args:
            steps: this rank's micro-batches, in as many steps as those of the other ranks.
            watch: compares the samples that they are made of.
        """
        super().__init__(steps)
        self._watch = watch
        self._pending: tuple[Any, torch.Tensor] | None = None

    def fetch(self) -> Step | None:
        """Return the next micro-batch; None at the end, or where reading has failed.

        Raises:
            DataError: streams do not end together, or are not the same.
        """
        self.check_end()
        step = self._next()
        more = [] if self._watch is None else self._watch.bits()
        self._pending = self._begin_exchange(step is not None, more)
        return step

    def check_end(self) -> None:
        """Wait until all ranks have told whether they have the micro-batch fetched last.

        Raises:
            DataError: only some have it, or ranks read other samples; on all ranks.
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

    def close(self) -> None:
        """Destroy the group once the last sum has arrived: every rank has started as many."""
        if self._pending is not None:
            self._pending[0].wait()
        super().close()


class RankPartSteps(_ExchangingSteps):
    """Micro-batches of ranks that each have a part of the data, until the longest part ends.

    A rank that has used its part up passes padding batches that carry no weight.
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
            steps: of this rank.
            padding_of: makes a micro-batch without weight of another.
            first_padding: makes a padding batch for a rank that had used up its part before the
                first step; None where the part is empty.
            num_samples: samples over all ranks of a padding batch's micro-step.
            drop_last: end with the first rank instead.
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
            DataError: a rank has no sample at all; on all ranks.
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
        """Find a padding batch for a rank that has nothing at the first step."""
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
    """Return the error that only ``number`` ranks have more of a stream that all read alike."""
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
