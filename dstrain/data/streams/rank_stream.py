"""Micro-batches from a stream that every rank reads whole and of which it keeps its share.

So the order of samples does not depend on topology. The exception is a stream that the user has
split by rank: each rank uses all samples of its part, so the order depends on that split.
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
    """Yield all samples of a stream in a loader process, as in the training process.

    A stream that calls ``get_worker_info`` would yield only a share of the samples (the pattern in
    torch's documentation); as each process here keeps every n-th micro-batch, the rest would be
    lost.
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
    """Micro-batches of a rank, from a stream that all ranks read alike or from this rank's part.

    With several loader processes each reads the whole stream and keeps every n-th micro-batch;
    torch's loader asks the processes in turn, so the order is that of a single process.

    After a resume, a stream with states begins at its saved position; for any other stream, the
    samples that were used are read again and dropped.

    Positions count samples over all ranks. If each rank has a part of the data, every micro-batch
    counts as full and equal on all ranks, so that each rank can compute its own position.

    Attributes:
        split: whether each rank's source is a part of the data.
        is_split_known: whether ``detect_split`` has confirmed ``split``.
        lengths: length of this rank's source; after ``detect_split``, lengths of all sources that
            are read. None for a source without a length.
        watch: comparison of samples between ranks; None without one.
    """

    def __init__(
        self,
        source: Iterable[Any],
        topology: Topology,
        collate: Callable[[list[Any]], Any],
        *,
        drop_last: bool = False,
    ) -> None:
        """Set the position to the start of the stream.

        Args:
            source: the stream of samples.
            topology: this rank among all ranks.
            collate: makes a micro-batch from a list of samples.
            drop_last: whether to drop a last chunk that is not full.
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
        self._first: list[Any] = []  # samples that ``peek`` has read from ``_iteration``
        self._iteration: Iterator[Any] | None = None
        self._first_epoch = _NO_EPOCH  # the epoch of ``_iteration``
        self._running: Iterator[Any] | None = None  # the epoch's iteration, in this process
        self._position = torch.tensor(
            [_NO_EPOCH, 0, 0]
        )  # epoch, start, whether samples are compared
        self.worker_seed = 0  # seed of loader processes; ``build_loader`` sets it
        self.keeps_states = False  # whether checkpoints may need states of the source
        self._resumable = Resumable.of(source)
        self._begin: tuple[int, int, dict[str, Any]] | None = None  # epoch, start, source's state
        # States after the last micro-batches: the loop is one or two behind the fetched ones.
        self._states: deque[tuple[int, dict[str, Any] | bytes | None]] = deque(maxlen=4)

    @property
    def step_samples(self) -> int:
        """Return the number of samples that a micro-step reads from this rank's source."""
        return self.topology.micro_batch if self.split else self.topology.chunk

    @property
    def num_readers(self) -> int:
        """Return the factor from a position in this rank's source to one over all ranks.

        It is the world size if the data is split, else 1.
        """
        return self.topology.world_size if self.split else 1

    def num_steps(self) -> int | None:
        """Return the micro-steps of an epoch by sources' lengths; None if a length is missing."""
        lengths = [length for length in self.lengths if length is not None]
        if len(lengths) < len(self.lengths):
            return None
        if self.drop_last:  # the first rank without a full micro-batch ends the epoch
            return min(length // self.step_samples for length in lengths)
        return max(-(-length // self.step_samples) for length in lengths)

    def watch_length(self) -> LengthWatch:
        """Return a counter, begun for this epoch, that checks micro-steps against the length."""
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
        """Read the first samples of an epoch ahead; the epoch's iteration yields them again.

        Returns None if they cannot be read a second time, as the source has a single iteration.
        """
        if self._iteration is not None and self.is_iterator:
            return None  # a second ``iter`` may begin anew, or go on
        self._set_source_epoch(epoch)
        iteration = iter(self._reader())
        if iteration is self._iteration:
            return None
        self._iteration, self._first_epoch = iteration, epoch
        self._first = list(islice(iteration, at_most))
        return self._first

    @property
    def is_iterator(self) -> bool:
        """Tell whether the source is its own iterator, so that samples can be read only once."""
        return hasattr(self._reader(), "__next__")

    def forget_peek(self) -> None:
        """Discard the samples of ``peek`` if the source can begin anew and yield them again.

        The next iteration may then be in another process.
        """
        if self._iteration is None or self.is_iterator:
            return
        if iter(self._reader()) is not self._iteration:
            self._iteration, self._first = None, []

    def read_again(self, number: int) -> list[Any] | None:
        """Read the first samples of the epoch again, without disturbing its present iteration.

        Returns None if that is not possible. Reads from a copy of the source, so that a position
        stored in the source is kept; state shared with the copy, such as an open file, moves on.
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
        """Make inputs of a padding batch from the first sample, for a rank whose part is used up.

        Returns None if the source is empty. Restores this process's random state.
        """
        state = random_state()
        try:
            first = list(islice(self._reader(), 1))
            return self.collate(first) if first else None
        finally:
            set_random_state(state)

    def share_position(self) -> None:
        """Share the position with persistent loader processes, so that they see ``set_epoch``."""
        self._position.share_memory_()

    def set_epoch(self, epoch: int, *, start: int = 0, state: dict[str, Any] | None = None) -> None:
        """Set the epoch, and the number of its samples to skip because they were used.

        ``state`` is the result of ``state_at(start)`` in the run that used them.
        """
        self._begin = (epoch, start, state) if start and state is not None else None
        # An epoch that begins at a state is not compared: its first samples cannot be read again.
        compares = self.watch is not None and self._begin is None
        if compares and self.watch is not None:
            compares = self.watch.begin(start=start, chunk=self.topology.chunk)
        self._position.copy_(torch.tensor([epoch, start, compares]))
        self._states.clear()
        if self._iteration is None or epoch != self._first_epoch:  # else ``peek`` has set it
            self._set_source_epoch(epoch)

    def state_at(self, samples: int) -> dict[str, Any] | None:
        """Return the source's state after ``samples`` samples of the epoch; None if not known.

        States are known at the ends of the last four micro-batches, if ``keeps_states`` was set
        before the epoch.
        """
        state = dict(self._states).get(samples)
        return pickle.loads(state) if isinstance(state, bytes) else state

    def note(self, sent: ShareWithState) -> Share:
        """Store the state that a loader process sent, and return the micro-batch it came with."""
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
        start //= self.num_readers  # position in this rank's source, as all positions below
        position = start if begun else 0
        keeps_states = self.keeps_states and self._resumable is not None
        step = 0
        summaries: list[SampleSummary] = []
        columns = None if self.watch is None else self.watch.columns
        self._states.clear()
        while True:
            if worker:  # also for skipped samples: the source may draw random numbers too
                rank = self.topology.rank
                MicroBatchSeed(self.worker_seed, epoch, rank, position).seed_generators()
            used = max(0, start - position)
            chunk = list(islice(samples, min(used, size) or size))
            if begun and self._resumable is not None:
                self._resumable.begun()
                begun = False
            if compares and step % turns == turn and position < WATCHED_SAMPLES:
                with host_generators_restored():  # lazy values may draw random numbers when read
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
        """Return an iterator over the samples of an epoch, those read by ``peek`` included."""
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
        """Load a checkpoint's state into the source if it is for this epoch and start.

        Returns:
            True if the source begins there.
        """
        if self._begin is None or self._resumable is None or self._begin[:2] != (epoch, start):
            return False  # persistent loader processes still have the state of an earlier epoch
        return self._resumable.load(self._begin[2])


class StreamLoader(DataLoader[Any]):
    """Loader of a ``RankStream`` that stores the states sent by loader processes.

    Loader processes pickle the states themselves: torch's queue would lose an item that it cannot
    pickle, and the loader would wait for it.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield collated micro-batches, as a loader of a map-style dataset does."""
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
    """Return (part, number of parts) of a stream that ``split_dataset_by_node`` made.

    Returns None for a whole stream, and for a stream that is not from ``datasets``.
    """
    found = getattr(source, "_distributed", None)
    number = getattr(found, "world_size", 1)
    return (int(found.rank), int(number)) if found is not None and number > 1 else None


def _pickled(state: dict[str, Any] | None) -> bytes | None:
    try:
        return None if state is None else pickle.dumps(state)
    except Exception:  # a user's dataset may raise anything
        return None
