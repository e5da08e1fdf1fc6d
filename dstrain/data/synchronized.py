"""Evaluation batches in equal number on all ranks, with the last one marked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dstrain.core.errors import DataError, Problem
from dstrain.core.ranks import PendingSum, is_distributed
from dstrain.data.lockstep import stream_ends_differ
from dstrain.data.order import RankBatchSampler
from dstrain.data.streams import Dispatched, RankStream
from dstrain.data.windows import MicroBatch, iterate, padding_batch


def synchronized_batches(loader: Any, *, device: Any) -> Iterator[tuple[MicroBatch, bool]]:
    """Yield micro-batches, each with a flag that it is the last on all ranks.

    If the loader's length is not known to be the same on all ranks (a stream, a user's own loader),
    ranks tell each other before each batch whether they have another, and compare the first samples
    of a stream that all read. A rank whose part of the data is used up yields padding batches, made
    from its last batch.

    Args:
        loader: loader of this rank.
        device: device of the tensors that ranks exchange.

    Raises:
        DataError: a rank has no batch at all while others have, or ranks that should read the same
            stream read different samples, or fewer; raised on all ranks.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, RankBatchSampler):
        num_steps = len(sampler)
        for step, (micro_batch, _) in enumerate(iterate(loader)):
            yield micro_batch, step == num_steps - 1
        return
    exchange = _BatchExchange(getattr(loader, "dataset", None), device)
    batches = (micro_batch for micro_batch, _ in iterate(loader))
    coming = next(batches, None)
    number = exchange.num_ranks_with_batch(coming is not None, is_first=True)
    while number:
        if coming is not None:
            present, spare = coming, padding_batch(coming)
            coming = next(batches, None)
        else:
            present = padding_batch(spare)
        number = exchange.num_ranks_with_batch(coming is not None)
        yield present, not number


class _BatchExchange:
    """Exchange, before every evaluation batch, of the number of ranks that have a batch."""

    def __init__(self, stream: Any, device: Any) -> None:
        """Set up for a pass over the data.

        Args:
            stream: the dataset that the loader reads.
            device: device of the tensors that ranks exchange.
        """
        self._device = device
        self._is_whole, self._watch = False, None
        if isinstance(stream, RankStream) and not isinstance(stream.source, Dispatched):
            self._is_whole, self._watch = not stream.split, stream.watch

    def num_ranks_with_batch(self, have: bool, *, is_first: bool = False) -> int:
        """Return the number of ranks that have a batch; a collective.

        Raises:
            DataError: see ``synchronized_batches``.
        """
        if not is_distributed():
            return int(have)
        more = [] if self._watch is None else self._watch.bits()
        told = PendingSum([1.0, float(have), *map(float, more)], device=self._device).get()
        world_size, number, *sums = map(int, told.tolist())
        if is_first and 0 < number < world_size:
            raise DataError(
                Problem(
                    f"only {number} ranks have evaluation data",
                    "a rank without a batch cannot take part in the forward passes of the others",
                    "give every rank a batch, or pass the dataset and let dstrain build the loader",
                )
            )
        if self._is_whole and 0 < number < world_size:
            raise stream_ends_differ(number, world_size)
        if self._watch is not None and sums:
            self._watch.check_sums(sums, world_size=world_size, ended=not number, group=None)
        return number
