"""Grouping of a loader's micro-batches into accumulation windows, one for each optimizer step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.core.ranks import is_distributed
from dstrain.data.loader_position import micro_steps
from dstrain.data.lockstep import LocalSteps, RankPartSteps, SharedStreamSteps
from dstrain.data.order import RankBatchSampler
from dstrain.data.samples import batch_size
from dstrain.data.streams import Dispatched, RankStream, StreamLoader


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of a forward pass.

    Attributes:
        inputs: the result of the collator.
        num_samples: samples of this rank in it, 0 for a padding batch; with dstrain's loaders the
            number passed to the collator, with a user's own loader the result of ``batch_size``.
    """

    inputs: Any
    num_samples: int

    @property
    def is_padding(self) -> bool:
        """Tell whether this is a padding batch, which has no weight in the loss."""
        return self.num_samples == 0


@dataclass(frozen=True)
class Window:
    """Micro-batches of a rank for an optimizer step.

    Attributes:
        micro_batches: one or more; the same number on all ranks.
        num_samples: samples over all ranks.
        ends_epoch: whether this is the epoch's last window.
    """

    micro_batches: tuple[MicroBatch, ...]
    num_samples: int
    ends_epoch: bool


def iterate(loader: Any) -> Iterator[tuple[MicroBatch, int]]:
    """Yield micro-batches, each with the number of samples of all ranks in that micro-step.

    For a stream, whose length is not known, this is always the number of a full micro-step. For a
    user's own loader, which is taken as this rank's share, it is not known and 0 is yielded.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, RankBatchSampler):
        for step, inputs in enumerate(loader):
            yield MicroBatch(inputs, sampler.share_samples(step)), sampler.chunk_samples(step)
        return
    if isinstance(loader, StreamLoader):
        stream: Any = loader.dataset
        watch = stream.watch_length()
        for share in loader.shares():
            watch.count()
            yield MicroBatch(share.inputs, share.num_samples), stream.topology.chunk
        watch.end()
        return
    for inputs in loader:
        yield MicroBatch(inputs, batch_size(inputs)), 0


@dataclass
class AheadHooks:
    """Functions to call around micro-batches that are fetched before their step is due.

    With a loader of unknown length the first micro-batch of the next window is fetched before a
    window is yielded. Fetching may draw random numbers (a collator that masks tokens), so a resumed
    run must fetch that micro-batch with the random state of that moment.

    Attributes:
        before: called before the first micro-batch of a next window is fetched.
        before_first: called before the first micro-batch to use is fetched, after skipped ones.
        after_first: called after that micro-batch was fetched.
    """

    before: Callable[[], None] | None = None
    before_first: Callable[[], None] | None = None
    after_first: Callable[[], None] | None = None


def fetches_ahead(loader: Any) -> bool:
    """Tell whether ``windows`` must fetch a micro-batch ahead to know that an epoch ends."""
    return not isinstance(getattr(loader, "batch_sampler", None), RankBatchSampler)


def windows(
    loader: Any, accumulation: int, *, skip: int = 0, ahead: AheadHooks | None = None
) -> Iterator[Window]:
    """Group an epoch into windows of ``accumulation`` micro-batches; the last may be shorter.

    Args:
        loader: loader of this rank.
        accumulation: micro-batches per window.
        skip: micro-batches to read and drop first, for loaders that cannot start inside an epoch.
        ahead: functions to call around early fetches; used only if ``fetches_ahead``.
    """
    steps = iterate(loader)
    for _ in range(skip):
        next(steps, None)
    if not fetches_ahead(loader):
        yield from _counted_windows(steps, len(loader.batch_sampler) - skip, accumulation)
        return
    together = _synchronized(loader, steps)
    try:
        yield from _windows_ahead(together, accumulation, ahead or AheadHooks())
    finally:
        together.close()


def _synchronized(loader: Any, steps: Iterator[tuple[MicroBatch, int]]) -> LocalSteps:
    """Return the micro-batches of a loader that fetches ahead, synchronized with other ranks."""
    stream = getattr(loader, "dataset", None)
    if not is_distributed():
        return LocalSteps(steps)
    if not isinstance(stream, RankStream):
        if micro_steps(loader) is not None:
            return LocalSteps(steps)  # the loader has a length, which is the same on all ranks
        return RankPartSteps(
            steps, padding_of=padding_batch, first_padding=lambda: None, num_samples=0
        )
    if isinstance(stream.source, Dispatched):
        return LocalSteps(steps)  # the main rank sends every block, and so the end
    if not stream.split:
        return SharedStreamSteps(steps, watch=stream.watch)

    def first_padding() -> MicroBatch | None:
        inputs = stream.padding_inputs()
        return None if inputs is None else MicroBatch(inputs, num_samples=0)

    return RankPartSteps(
        steps,
        padding_of=padding_batch,
        first_padding=first_padding,
        num_samples=stream.topology.chunk,
        drop_last=stream.drop_last,
    )


def padding_batch(micro_batch: MicroBatch) -> MicroBatch:
    """Return a micro-batch as a padding batch, with a shallow copy of its mapping.

    Entries may be removed from either mapping later.
    """
    inputs = micro_batch.inputs
    return MicroBatch(copy.copy(inputs) if isinstance(inputs, Mapping) else inputs, num_samples=0)


def _windows_ahead(steps: LocalSteps, accumulation: int, hooks: AheadHooks) -> Iterator[Window]:
    """Yield the windows of an epoch of unknown length, fetching a micro-batch ahead of each."""
    batch: list[MicroBatch] = []
    samples = 0
    if hooks.before_first is not None:
        hooks.before_first()
    coming = steps.fetch()
    if hooks.after_first is not None:
        hooks.after_first()
    while coming is not None:
        micro_batch, count = coming
        batch.append(micro_batch)
        samples += count
        if hooks.before is not None and len(batch) == accumulation:
            hooks.before()
        coming = steps.fetch()
        if len(batch) == accumulation or coming is None:
            if len(batch) < accumulation:
                steps.check_end()  # raises if another rank has more, and so a longer window
            yield Window(tuple(batch), samples, ends_epoch=coming is None)
            batch, samples = [], 0
    steps.check_end()


def _counted_windows(
    steps: Iterator[tuple[MicroBatch, int]], num_steps: int, accumulation: int
) -> Iterator[Window]:
    """Yield the windows of an epoch of known length, without fetching ahead."""
    while num_steps > 0:
        part = [next(steps) for _ in range(min(accumulation, num_steps))]
        num_steps -= len(part)
        samples = sum(count for _, count in part)
        yield Window(tuple(m for m, _ in part), samples, ends_epoch=num_steps == 0)
