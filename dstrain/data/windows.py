"""The accumulation windows that an optimizer step consumes, made of a loader's micro-batches."""

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
    """The inputs of one forward pass.

    Attributes:
        inputs: what the collator made.
        num_samples: samples of this rank in it: of dstrain's own loaders as many as the collator
            was given, of a user's own as ``batch_size`` judges by the tensors. 0 for a padding
            batch.
    """

    inputs: Any
    num_samples: int

    @property
    def is_padding(self) -> bool:
        """Tell whether it is a padding batch, which carries no weight."""
        return self.num_samples == 0


@dataclass(frozen=True)
class Window:
    """The micro-batches of one rank for one optimizer step.

    Attributes:
        micro_batches: one or more; the same number on all ranks.
        num_samples: samples over all ranks.
        ends_epoch: whether this is the epoch's last window, where that is known.
    """

    micro_batches: tuple[MicroBatch, ...]
    num_samples: int
    ends_epoch: bool


def iterate(loader: Any) -> Iterator[tuple[MicroBatch, int]]:
    """Yield micro-batches, each with the number of samples that all ranks have in that micro-step.

    A stream's length is not known, so at its end the number is that of a full micro-step; of a
    user's own loader, which is taken as this rank's share, nothing is known and it is 0.
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

    A loader of unknown length is asked for the first micro-batch of the next window before a window
    is handed out. Fetching may draw random numbers (a collator that masks tokens), so a run that
    goes on from a checkpoint must fetch that micro-batch with the generators as they were then.

    Attributes:
        before: called before the first micro-batch of a next window is fetched.
        before_first: called before the first micro-batch that is used, after those skipped.
        after_first: called once it is there.
    """

    before: Callable[[], None] | None = None
    before_first: Callable[[], None] | None = None
    after_first: Callable[[], None] | None = None


def fetches_ahead(loader: Any) -> bool:
    """Tell whether ``windows`` must fetch one micro-batch more to know that an epoch ends."""
    return not isinstance(getattr(loader, "batch_sampler", None), RankBatchSampler)


def windows(
    loader: Any, accumulation: int, *, skip: int = 0, ahead: AheadHooks | None = None
) -> Iterator[Window]:
    """Group an epoch into windows of ``accumulation`` micro-batches; the last may be shorter.

    Args:
        loader: of this rank.
        accumulation: micro-batches per window.
        skip: micro-batches to read and drop first, for loaders that cannot start inside an epoch.
        ahead: only for loaders that fetch ahead.
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
    """Return the micro-batches of a loader that fetches ahead, in step with the other ranks."""
    stream = getattr(loader, "dataset", None)
    if not is_distributed():
        return LocalSteps(steps)
    if not isinstance(stream, RankStream):
        if micro_steps(loader) is not None:
            return LocalSteps(steps)  # a length, which is the same on all ranks
        return RankPartSteps(
            steps, padding_of=padding_batch, first_padding=lambda: None, num_samples=0
        )
    if isinstance(stream.source, Dispatched):
        return LocalSteps(steps)  # the main rank says where it ends
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
    """Return a micro-batch without weight, a shallow copy: entries may be taken out of either."""
    inputs = micro_batch.inputs
    return MicroBatch(copy.copy(inputs) if isinstance(inputs, Mapping) else inputs, num_samples=0)


def _windows_ahead(steps: LocalSteps, accumulation: int, hooks: AheadHooks) -> Iterator[Window]:
    """Yield the windows of an epoch of unknown length: it ends where fetching gives nothing."""
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
                steps.check_end()  # the window of another rank would be longer
            yield Window(tuple(batch), samples, ends_epoch=coming is None)
            batch, samples = [], 0
    steps.check_end()


def _counted_windows(
    steps: Iterator[tuple[MicroBatch, int]], num_steps: int, accumulation: int
) -> Iterator[Window]:
    """Yield the windows of an epoch whose length is known: nothing is fetched before it is due."""
    while num_steps > 0:
        part = [next(steps) for _ in range(min(accumulation, num_steps))]
        num_steps -= len(part)
        samples = sum(count for _, count in part)
        yield Window(tuple(m for m, _ in part), samples, ends_epoch=num_steps == 0)
