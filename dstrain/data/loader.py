"""Per-rank loaders, and the accumulation windows that an optimizer step consumes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from dstrain.core.errors import DataError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import is_distributed
from dstrain.core.seeds import derived_seed
from dstrain.data.dispatch import Dispatched
from dstrain.data.lockstep import LocalSteps, OwnSteps, SameSteps
from dstrain.data.noise import begin_worker
from dstrain.data.order import EpochOrder, RankBatchSampler, Topology
from dstrain.data.rebalance import RebalancedBatchSampler
from dstrain.data.samples import batch_size
from dstrain.data.stream import RankStream, StreamLoader, share_of

logger = get_logger(__name__)

Collator = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class LoaderOptions:
    """The options of a loader; most are those of ``torch.utils.data.DataLoader``.

    ``dispatch``: the main rank reads a stream and sends the others its samples. ``rebalance``:
    micro-batches per optimizer step, to deal the samples of each step out by their lengths; None
    gives each micro-batch the same number of samples.
    """

    num_workers: int = 0
    prefetch_factor: int | None = None
    pin_memory: bool = False
    persistent_workers: bool = False
    multiprocessing_context: str | None = None
    drop_last: bool = False
    dispatch: bool = False
    rebalance: int | None = None


@dataclass(frozen=True)
class MicroBatch:
    """The inputs of one forward pass.

    Attributes:
        inputs: what the collator made.
        num_samples: samples of this rank in it: of dstrain's own loaders as many as the collator
            was given, of a user's own as ``batch_size`` judges by the tensors. 0 for a stand-in.
    """

    inputs: Any
    num_samples: int

    @property
    def masked(self) -> bool:
        """Tell whether it is a stand-in, which carries no weight."""
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


def is_stream(dataset: Any) -> bool:
    """Tell whether a dataset has no length and can only be iterated."""
    return isinstance(dataset, IterableDataset) or not (
        isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")
    )


def build_loader(
    dataset: Any,
    topology: Topology,
    collate: Collator,
    options: LoaderOptions,
    *,
    seed: int,
    shuffle: bool,
    lengths: Sequence[int] | torch.Tensor | None = None,
) -> DataLoader[Any]:
    """Return a loader of this rank's micro-batches, one per micro-step.

    A map-style dataset is read through ``RankBatchSampler``; a stream through ``RankStream`` in the
    stream's own order. ``lengths`` of a map-style dataset put similar samples beside each other, or
    with ``options.rebalance`` tell how to deal the samples of an optimizer step out.
    Nothing is read, and no other rank is asked: ``settle`` does that, before a loader is used.

    Raises:
        DataError: a dataset with no samples, or one that cannot be dispatched.
    """
    if options.dispatch:
        if not is_stream(dataset):
            raise _cannot_dispatch("a dataset with a length, of which every rank reads its own")
        if share_of(dataset) is not None:
            raise _cannot_dispatch("split_dataset_by_node: the main rank would read its part alone")
        if options.num_workers:
            raise _cannot_dispatch("dataloader_num_workers above 0: ranks must read in step")
        main = topology.rank == 0
        dataset = Dispatched(dataset, is_main=main, block=topology.chunk)
    workers = options.num_workers
    extra: dict[str, Any] = {}
    if workers:
        extra = {
            "prefetch_factor": options.prefetch_factor,
            "persistent_workers": options.persistent_workers,
            "multiprocessing_context": options.multiprocessing_context,
        }
    common: dict[str, Any] = {
        "pin_memory": options.pin_memory,
        "worker_init_fn": begin_worker,
        **extra,
    }
    # Seeds of loader processes: their own on each rank, and apart from the global random state.
    noise = derived_seed(seed, step=0, rank=topology.rank)
    common["generator"] = torch.Generator().manual_seed(noise)
    if is_stream(dataset):
        if workers > (limit := _worker_limit(dataset, workers)):
            logger.warning(
                "%s gives its samples in order to %d loader process only: using %d instead of %d",
                type(dataset).__name__,
                limit,
                limit,
                workers,
            )
            workers = limit
        stream = RankStream(dataset, topology, collate, drop_last=options.drop_last)
        stream.noise_seed = seed
        if workers and options.persistent_workers:
            stream.share_position()
        return StreamLoader(
            stream, batch_size=None, collate_fn=_as_it_is, num_workers=workers, **common
        )
    if len(dataset) == 0:
        raise DataError(Problem("the dataset is empty", "at least one sample is needed"))
    sampler = _sampler(len(dataset), topology, options, seed=seed, shuffle=shuffle, lengths=lengths)
    sampler.noise_seed = seed
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        **common,
    )


def _sampler(
    num_samples: int,
    topology: Topology,
    options: LoaderOptions,
    *,
    seed: int,
    shuffle: bool,
    lengths: Sequence[int] | torch.Tensor | None,
) -> RankBatchSampler:
    """Return the sampler that says which samples of a map-style dataset this rank reads when."""
    if options.rebalance is None or lengths is None:
        order = EpochOrder(num_samples, seed=seed, shuffle=shuffle, lengths=lengths)
        return RankBatchSampler(order, topology, drop_last=options.drop_last)
    return RebalancedBatchSampler(
        EpochOrder(num_samples, seed=seed, shuffle=shuffle),
        topology,
        lengths=torch.as_tensor(lengths),
        accumulation=options.rebalance,
        drop_last=options.drop_last,
    )


def _cannot_dispatch(what: str) -> DataError:
    return DataError(
        Problem(f"dispatch_batches=True with {what}", "", "leave it out, or change the other")
    )


def is_ours(loader: Any) -> bool:
    """Tell whether ``build_loader`` made the loader, so that ranks share its samples out."""
    return isinstance(getattr(loader, "batch_sampler", None), RankBatchSampler) or isinstance(
        getattr(loader, "dataset", None), RankStream
    )


def end_processes(loader: Any) -> None:
    """End the processes that ``loader`` keeps between its iterations, if any.

    Left to Python's collector, which meets them in a cycle, each would be waited for in vain for
    five seconds: the queue that tells it to end is gone by then.
    """
    if getattr(loader, "_iterator", None) is not None:
        loader._iterator = None  # the only reference, so that it ends here


def micro_steps(loader: Any) -> int | None:
    """Return the micro-steps of a whole epoch, or None for a stream without a length.

    The length of a stream is its ``__len__``; where ranks have parts of their own, the longest
    counts.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, RankBatchSampler):
        return len(sampler.whole())
    if isinstance(stream := getattr(loader, "dataset", None), RankStream):
        return stream.num_steps()
    try:
        return len(loader)
    except TypeError:
        return None


def num_samples(loader: Any) -> int | None:
    """Return the samples of the dataset behind a loader over all ranks; None without a length."""
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, RankStream):
        if dataset.split:
            lengths = [length for length in dataset.lengths if length is not None]
            return sum(lengths) if len(lengths) == len(dataset.lengths) else None
        dataset = dataset.source
    # torch's own IterableDataset has no length; wrappers of one (a shard) keep it in `dataset`.
    for found in (dataset, getattr(dataset, "dataset", None)):
        try:
            return len(found)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            continue
    return None


def set_epoch(
    loader: Any,
    epoch: int,
    *,
    start: int = 0,
    source: dict[str, Any] | None = None,
    trains: bool = True,
) -> None:
    """Point a loader at an epoch and at the first sample of it that is still to be used.

    Args:
        loader: of either kind, or one of the user's own.
        epoch: from 0.
        start: samples of the epoch that were used, over all ranks.
        source: what ``source_state`` gave there; without it a stream is read from its beginning.
        trains: whether to tell a dataset with a length too. It may be evaluated on in between.
    """
    for part in (getattr(loader, "batch_sampler", None), getattr(loader, "dataset", None)):
        if isinstance(part, (RankBatchSampler, RankStream)):
            if isinstance(part, RankStream):
                part.set_epoch(epoch, start=start, state=source)
            else:
                part.set_epoch(epoch, start=start)
                if trains:
                    _tell_dataset(loader, epoch, sampler=part)
            # Noise in loader processes is that of the epoch, wherever the run began.
            seed = derived_seed(part.noise_seed, step=epoch, rank=part.topology.rank)
            loader.generator.manual_seed(seed)
            return
    for part in (loader, getattr(loader, "sampler", None), getattr(loader, "dataset", None)):
        tell = getattr(part, "set_epoch", None)
        if tell is not None:
            tell(epoch)
            return


def _tell_dataset(loader: Any, epoch: int, *, sampler: RankBatchSampler) -> None:
    """Tell a dataset with a length which epoch begins, as a curriculum needs to know.

    It may have another length then. Loader processes have a copy of it, and are started anew.
    """
    tell = getattr(loader.dataset, "set_epoch", None)
    if tell is None:
        return
    tell(epoch)
    end_processes(loader)
    before, now = sampler.order.num_samples, len(loader.dataset)
    if now != before:
        sampler.follow_length(now)
        logger.warning(
            "the dataset has %d samples in epoch %d, and had %d before: the run ends at the step "
            "that was computed at its start, so set max_steps to the one that you want",
            now,
            epoch,
            before,
        )


def keep_source_states(loader: Any) -> None:
    """Keep positions of the stream behind a loader from its next epoch on, for ``source_state``."""
    if isinstance(stream := getattr(loader, "dataset", None), RankStream):
        stream.keeps_states = True


def source_state(loader: Any, samples: int) -> dict[str, Any] | None:
    """Return the state of the stream behind a loader after ``samples`` samples of the epoch.

    ``samples`` counts those of all ranks. The state is the same whatever the topology, and on
    whichever rank, unless each rank has a part of its own. None where the dataset is no stream, or
    cannot tell its position exactly.
    """
    stream = getattr(loader, "dataset", None)
    return stream.state_at(samples) if isinstance(stream, RankStream) else None


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
    in_step = _in_step(loader, steps)
    try:
        yield from _windows_ahead(in_step, accumulation, ahead or AheadHooks())
    finally:
        in_step.close()


def _in_step(loader: Any, steps: Iterator[tuple[MicroBatch, int]]) -> LocalSteps:
    """Return the micro-batches of a loader that fetches ahead, in step with the other ranks."""
    stream = getattr(loader, "dataset", None)
    if not is_distributed():
        return LocalSteps(steps)
    if not isinstance(stream, RankStream):
        if micro_steps(loader) is not None:
            return LocalSteps(steps)  # a length, which is the same on all ranks
        return OwnSteps(steps, masked=stand_in_for, stand_in=lambda: None, num_samples=0)
    if isinstance(stream.source, Dispatched):
        return LocalSteps(steps)  # the main rank says where it ends
    if not stream.split:
        return SameSteps(steps, watch=stream.watch)

    def stand_in() -> MicroBatch | None:
        inputs = stream.stand_in()
        return None if inputs is None else MicroBatch(inputs, num_samples=0)

    return OwnSteps(
        steps,
        masked=stand_in_for,
        stand_in=stand_in,
        num_samples=stream.topology.chunk,
        drop_last=stream.drop_last,
    )


def stand_in_for(micro_batch: MicroBatch) -> MicroBatch:
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


def _as_it_is(batch: Any) -> Any:
    """Return the batch unchanged, where torch would make lists of tuples and tensors of arrays."""
    return batch


def _worker_limit(dataset: Any, wanted: int) -> int:
    """Return how many loader processes a stream works in; some split themselves over processes."""
    import datasets

    if isinstance(dataset, datasets.IterableDataset):
        return 1
    return int(getattr(dataset, "max_workers", wanted))
