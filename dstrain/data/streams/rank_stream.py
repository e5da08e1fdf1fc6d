"""Streams: every rank reads the same stream and keeps its own share, so topology never matters.

A stream that the user has split by rank is the exception: each rank uses all that its own part
gives, so the order of samples follows from that split.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils import worker as worker_module

from dstrain.core.seeds import random_state, set_random_state
from dstrain.data.comparison.stream_watch import WATCHED_SAMPLES, StreamWatch
from dstrain.data.comparison.summaries import SampleSummary, summary_of
from dstrain.data.order import Topology
from dstrain.data.streams.length import LengthWatch, length_of
from dstrain.data.streams.resumable import Resumable, set_source_epoch
from dstrain.data.streams.share import Share, ShareWithState
from dstrain.data.worker_seeds import MicroBatchSeed, host_generators_restored

_NO_EPOCH = -1
_END = object()


@contextlib.contextmanager
def _as_in_main_process() -> Iterator[None]:
    """Hide from the body that this is a loader process."""
    info = worker_module._worker_info
    worker_module._worker_info = None
    try:
        yield
    finally:
        worker_module._worker_info = info


def _whole(source: Iterable[Any]) -> Iterator[Any]:
    """Yield a stream's samples in a loader process as in the training process.

    A stream that asks torch for its worker keeps a share of the samples (the pattern in torch's
    documentation); every n-th micro-batch of a share would lose the rest.
    """
    with _as_in_main_process():
        samples = iter(source)
    while True:
        with _as_in_main_process():
            sample = next(samples, _END)
        if sample is _END:
            return
        yield sample


class RankStream(IterableDataset[Any]):
    """Micro-batches of one rank, from a stream that all ranks read alike or from a part of its own.

    With several loader processes each reads the whole stream and takes every n-th micro-batch;
    torch's loader asks them in turn, so the order is that of one process.

    A stream that can tell its position is begun there after a resume; of any other, the samples
    that were used are read again and dropped.

    Positions are in samples over all ranks. Where each rank has a part of its own they count every
    micro-batch as full and the same on all ranks, so that a rank's own position follows from them.

    Attributes:
        split: whether each rank's source is a part of its own.
        is_split_known: whether that is known, and not only assumed.
        lengths: what sources say of their length: that of this rank, or, once all ranks have told
            each other, those of all that are read.
        watch: compares what ranks read of a stream that began alike on all.
    """

    def __init__(
        self,
        source: Iterable[Any],
        topology: Topology,
        collate: Callable[[list[Any]], Any],
        *,
        drop_last: bool = False,
    ) -> None:
        """Begin at the start of the stream.

        Args: stream, topology, collator of a list of samples, whether to drop a short end.
        """
        self.source = source
        self.topology = topology
        self.collate = collate
        self.drop_last = drop_last
        share = share_of(source)
        self.split = share is not None and share[1] == topology.world_size
        self.is_split_known = False
        self.lengths = [length_of(source)]
        self.watch: StreamWatch | None = None
        self._length_watch: LengthWatch | None = None
        self._first: list[Any] = []  # of an iteration that has begun, in the epoch _first_epoch
        self._iteration: Iterator[Any] | None = None
        self._first_epoch = _NO_EPOCH
        self._running: Iterator[Any] | None = None  # of this process, which is being read
        self._position = torch.tensor(
            [_NO_EPOCH, 0, 0]
        )  # epoch, start, whether samples are compared
        self.worker_seed = 0  # of loader processes; the loader's builder sets it
        self.keeps_states = False  # where a checkpoint may want to know the source's position
        self._resumable = Resumable.of(source)
        self._begin: tuple[int, int, dict[str, Any]] | None = None  # epoch, start, source's state
        # Of the last micro-batches: the loop is one or two behind what it was given.
        self._states: deque[tuple[int, dict[str, Any] | bytes | None]] = deque(maxlen=4)

    @property
    def step_samples(self) -> int:
        """Return the samples of this rank's source that a micro-step takes."""
        return self.topology.micro_batch if self.split else self.topology.chunk

    @property
    def num_readers(self) -> int:
        """Return the ranks over which positions count samples: all if the data is split, else 1."""
        return self.topology.world_size if self.split else 1

    def num_steps(self) -> int | None:
        """Return the micro-steps of an epoch by stated lengths; None where a length is missing."""
        lengths = [length for length in self.lengths if length is not None]
        if len(lengths) < len(self.lengths):
            return None
        if self.drop_last:  # the first rank without a full micro-batch ends the epoch
            return min(length // self.step_samples for length in lengths)
        return max(-(-length // self.step_samples) for length in lengths)

    def watch_length(self) -> LengthWatch:
        """Return the counter that checks the epoch's micro-steps against the stated length."""
        own = self.lengths[self.topology.rank if len(self.lengths) > 1 else 0]
        size, start = self.step_samples, int(self._position[1]) // self.num_readers
        left = 0 if own is None else max(0, own - start)
        if self._length_watch is None:
            tells = own is not None and (self.split or self.topology.rank == 0)
            name = type(self.source).__name__
            self._length_watch = LengthWatch(name, length=own or 0, tells=tells)
        self._length_watch.begin(left // size if self.drop_last else -(-left // size))
        return self._length_watch

    def peek(self, *, epoch: int, at_most: int) -> list[Any] | None:
        """Read the first samples of an epoch ahead; its iteration returns them again.

        None where they cannot be read a second time, because the source has a single iteration.
        """
        if self._iteration is not None and self.is_iterator:
            return None  # asked for another iteration it may begin anew, or go on
        self._set_source_epoch(epoch)
        iteration = iter(self._reader())
        if iteration is self._iteration:
            return None
        self._iteration, self._first_epoch = iteration, epoch
        self._first = list(islice(iteration, at_most))
        return self._first

    @property
    def is_iterator(self) -> bool:
        """Tell whether the source is its own iterator, so that what is read of it is gone."""
        return hasattr(self._reader(), "__next__")

    def forget_peek(self) -> None:
        """Let the next iteration begin anew where it can, so that it may be in another process."""
        if self._iteration is None or self.is_iterator:
            return
        if iter(self._reader()) is not self._iteration:
            self._iteration, self._first = None, []

    def read_again(self, number: int) -> list[Any] | None:
        """Return the first samples of the epoch, read anew beside an iteration of it that goes on.

        None where that cannot be. They are those of a copy, so that what the source keeps of its
        position stays; what it shares with a copy, such as an open file, is moved on.
        """
        if self.is_iterator:
            return None
        known = Resumable.of(self.source)
        has_own = known is not None and known.source is not self.source
        source = known.source if known is not None and has_own else copy.copy(self.source)
        epoch = int(self._position[0])
        generator = getattr(source, "generator", None)
        drawn = generator.get_state() if isinstance(generator, torch.Generator) else None
        try:
            if epoch != _NO_EPOCH:
                set_source_epoch(source, epoch)
            iteration = iter(source)
            if any(iteration is begun for begun in (self._running, self._iteration)):
                return None
            return list(islice(iteration, number))
        finally:
            if isinstance(generator, torch.Generator) and drawn is not None:
                generator.set_state(drawn)

    def padding_inputs(self) -> Any:
        """Return inputs that carry no weight, for a rank that has used up its part.

        They are read from the beginning of the source; None if that is empty.
        """
        state = random_state()
        try:
            first = list(islice(self._reader(), 1))
            return self.collate(first) if first else None
        finally:
            set_random_state(state)

    def share_position(self) -> None:
        """Let loader processes that outlive an epoch see what ``set_epoch`` says of the next."""
        self._position.share_memory_()

    def set_epoch(self, epoch: int, *, start: int = 0, state: dict[str, Any] | None = None) -> None:
        """Tell the stream its epoch, and how many samples to leave out because they were used.

        ``state`` is what ``state_at(start)`` gave in the run that used them.
        """
        self._begin = (epoch, start, state) if start and state is not None else None
        # An epoch that is begun inside is left out: what ranks read again could not be the same.
        compares = self.watch is not None and self._begin is None
        if compares and self.watch is not None:
            compares = self.watch.begin(start=start, chunk=self.topology.chunk)
        self._position.copy_(torch.tensor([epoch, start, compares]))
        self._states.clear()
        if self._iteration is None or epoch != self._first_epoch:  # else it knows, and has begun
            self._set_source_epoch(epoch)

    def state_at(self, samples: int) -> dict[str, Any] | None:
        """Return the source's state after ``samples`` samples of the epoch; None if not known.

        Known are the ends of the last micro-batches, if ``keeps_states`` was set before the first.
        """
        state = dict(self._states).get(samples)
        return pickle.loads(state) if isinstance(state, bytes) else state

    def note(self, sent: ShareWithState) -> Share:
        """Keep the state that a loader process sent, and return its micro-batch."""
        self._states.append((sent.position, sent.state))
        return sent.share

    def _reader(self) -> Any:
        return self.source if self._resumable is None else self._resumable.source

    def _set_source_epoch(self, epoch: int) -> None:
        set_source_epoch(self._reader(), epoch)

    def __iter__(self) -> Iterator[Any]:
        """Yield collated micro-batches, each a ``Share`` or a ``ShareWithState`` with one."""
        worker = get_worker_info()
        turn, turns = (worker.id, worker.num_workers) if worker else (0, 1)
        epoch, start, compares = self._position.tolist()
        if worker and epoch != _NO_EPOCH:
            self._set_source_epoch(epoch)
        begun = self._load(epoch, start)
        samples = self._samples(epoch, begins_inside=begun, in_worker=worker is not None)
        size = self.step_samples
        start //= self.num_readers  # of this rank's source, as all positions here
        position = start if begun else 0
        keeps_states = self.keeps_states and self._resumable is not None
        step = 0
        summaries: list[SampleSummary] = []
        columns = None if self.watch is None else self.watch.columns
        self._states.clear()
        while True:
            if worker:  # also for what is left out: the source may draw random numbers too
                rank = self.topology.rank
                MicroBatchSeed(self.worker_seed, epoch, rank, position).seed_generators()
            used = max(0, start - position)
            chunk = list(islice(samples, min(used, size) or size))
            if begun and self._resumable is not None:
                self._resumable.begun()
                begun = False
            if compares and step % turns == turn and position < WATCHED_SAMPLES:
                with host_generators_restored():  # what is lazy may draw some when it is looked at
                    summaries += [
                        summary_of(s, columns) for s in chunk[: WATCHED_SAMPLES - position]
                    ]
            position += len(chunk)
            if not chunk:
                return
            end = (position if not self.split else -(-position // size) * size) * self.num_readers
            if keeps_states and not worker:
                self._states.append((end, self._state()))
            if used:
                continue
            if self.drop_last and len(chunk) < size:
                return
            if step % turns == turn:
                share = self.topology.share(len(chunk))
                mine = chunk if self.split else [chunk[i] for i in share]
                part = Share(self.collate(mine or chunk[:1]), len(mine), summaries)
                summaries = []
                if worker and keeps_states:
                    yield ShareWithState(part, end, _pickled(self._state()))
                else:
                    yield part
            step += 1

    def _samples(self, epoch: int, *, begins_inside: bool, in_worker: bool) -> Iterator[Any]:
        """Return the samples of an epoch, those that ``peek`` has read included."""
        first, begun, self._first = self._first, self._iteration, []
        if begins_inside:
            self._iteration = None
            return _whole(self._reader()) if in_worker else iter(self._reader())
        if begun is not None and not in_worker:
            self._iteration = None
            if epoch == self._first_epoch:
                self._running = begun
                return chain(first, begun)
        samples = _whole(self._reader()) if in_worker else iter(self._reader())
        self._running = None if in_worker else samples
        is_begun = begun is not None and (in_worker or samples is begun)
        return chain(first, samples) if is_begun else samples

    def _state(self) -> dict[str, Any] | None:
        return None if self._resumable is None else self._resumable.state()

    def _load(self, epoch: int, start: int) -> bool:
        """Begin the source at a checkpoint's position, if that is for this epoch and start."""
        if self._begin is None or self._resumable is None or self._begin[:2] != (epoch, start):
            return False  # loader processes that outlive an epoch still hold the first one's
        return self._resumable.load(self._begin[2])


class StreamLoader(DataLoader[Any]):
    """A loader of a ``RankStream``; keeps the states that loader processes send with micro-batches.

    They are pickled there already: what torch's queue cannot pickle, it loses, and waits for.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield micro-batches, as a loader of a map-style dataset does."""
        for share in self.shares():
            yield share.inputs

    def shares(self) -> Iterator[Share]:
        """Yield micro-batches, each with its number of samples."""
        stream: Any = self.dataset
        for part in super().__iter__():
            share = stream.note(part) if isinstance(part, ShareWithState) else part
            if share.summaries and stream.watch is not None:
                stream.watch.note(share.summaries)
            yield share


def share_of(source: Any) -> tuple[int, int] | None:
    """Return which part of how many ``split_dataset_by_node`` made this one.

    None of a whole stream, and of one that ``datasets`` has not made.
    """
    found = getattr(source, "_distributed", None)
    number = getattr(found, "world_size", 1)
    return (int(found.rank), int(number)) if found is not None and number > 1 else None


def _pickled(state: dict[str, Any] | None) -> bytes | None:
    try:
        return None if state is None else pickle.dumps(state)
    except Exception:  # of a dataset of the user's own, anything
        return None
