"""Streams: every rank reads the same stream and keeps its own share, so topology never matters."""

from __future__ import annotations

import contextlib
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils import pin_memory as pinning
from torch.utils.data._utils import worker as worker_module

from dstrain.data.noise import Noise
from dstrain.data.order import Topology
from dstrain.data.resumable import Resumable

_UNTOLD = -1
_END = object()


@dataclass
class Share:
    """A rank's part of a micro-step, collated.

    Attributes:
        inputs: the micro-batch.
        num_samples: samples that were collated; 0 where this rank had none left and ``inputs`` is a
            stand-in, which must carry no weight.
    """

    inputs: Any
    num_samples: int

    def pin_memory(self) -> Share:
        """Asked by torch's loader."""
        return Share(pinning.pin_memory(self.inputs), self.num_samples)


@dataclass
class Told:
    """A micro-batch of a loader process, on its way.

    Attributes:
        share: what the training process is to get.
        position: samples of the epoch up to its end, over all ranks.
        state: the source's state there, pickled; None where that cannot be.
    """

    share: Share
    position: int
    state: bytes | None

    def pin_memory(self) -> Told:
        """Asked by torch's loader."""
        return Told(self.share.pin_memory(), self.position, self.state)


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
    """Iterate in a loader process as in a process without any.

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
    """Micro-batches of one rank from a stream that all ranks read alike.

    With several loader processes each reads the whole stream and takes every n-th micro-batch;
    torch's loader asks them in turn, so the order is that of one process.

    A stream that can tell its position is begun there after a resume; of any other, the samples
    that were used are read again and dropped.
    """

    def __init__(
        self,
        source: Iterable[Any],
        topology: Topology,
        collate: Callable[[list[Any]], Any],
        *,
        drop_last: bool = False,
    ) -> None:
        """Args: stream, topology, collator of a list of samples, whether to drop a short end."""
        self.source = source
        self.topology = topology
        self.collate = collate
        self.drop_last = drop_last
        self._position = torch.tensor([_UNTOLD, 0])  # epoch and start
        self.noise_seed = 0  # of loader processes; the loader's builder sets it
        self.keeps_states = False  # where a checkpoint may want to know the source's position
        self._resumable = Resumable.of(source)
        self._begin: tuple[int, int, dict[str, Any]] | None = None  # epoch, start, source's state
        # Of the last micro-batches: the loop is one or two behind what it was given.
        self._states: deque[tuple[int, dict[str, Any] | bytes | None]] = deque(maxlen=4)

    def share_position(self) -> None:
        """Let loader processes that outlive an epoch see what ``set_epoch`` says of the next."""
        self._position.share_memory_()

    def set_epoch(self, epoch: int, *, start: int = 0, state: dict[str, Any] | None = None) -> None:
        """Tell the stream its epoch, and how many samples to leave out because they were used.

        ``state`` is what ``state_at(start)`` gave in the run that used them.
        """
        self._position.copy_(torch.tensor([epoch, start]))
        self._begin = (epoch, start, state) if start and state is not None else None
        self._states.clear()
        self._tell_source(epoch)

    def state_at(self, samples: int) -> dict[str, Any] | None:
        """The source's state after ``samples`` samples of the epoch; None where it is not known.

        Known are the ends of the last micro-batches, if ``keeps_states`` was set before the first.
        """
        state = dict(self._states).get(samples)
        return pickle.loads(state) if isinstance(state, bytes) else state

    def note(self, told: Told) -> Share:
        """Keep the state that a loader process sent; returns its micro-batch."""
        self._states.append((told.position, told.state))
        return told.share

    def _reader(self) -> Any:
        return self.source if self._resumable is None else self._resumable.source

    def _tell_source(self, epoch: int) -> None:
        source = self._reader()
        generator = getattr(source, "generator", None)
        if hasattr(source, "set_epoch"):
            source.set_epoch(epoch)
        elif isinstance(generator, torch.Generator):
            generator.manual_seed(epoch)

    def __iter__(self) -> Iterator[Any]:
        """Collated micro-batches, each a ``Share`` or a ``Told`` with one."""
        worker = get_worker_info()
        turn, turns = (worker.id, worker.num_workers) if worker else (0, 1)
        epoch, start = self._position.tolist()
        if worker and epoch != _UNTOLD:
            self._tell_source(epoch)
        begun = self._load(epoch, start)
        samples = _whole(self._reader()) if worker else iter(self._reader())
        position = start if begun else 0
        tells = self.keeps_states and self._resumable is not None
        step = 0
        self._states.clear()
        while True:
            if worker:  # also for what is left out: the source may draw random numbers too
                Noise(self.noise_seed, epoch, self.topology.rank, position).sow()
            used = max(0, start - position)
            chunk = list(islice(samples, min(used, self.topology.chunk) or self.topology.chunk))
            if begun and self._resumable is not None:
                self._resumable.begun()
                begun = False
            position += len(chunk)
            if not chunk:
                return
            if tells and not worker:
                self._states.append((position, self._state()))
            if used:
                continue
            if self.drop_last and len(chunk) < self.topology.chunk:
                return
            if step % turns == turn:
                share = self.topology.share(len(chunk))
                mine = [chunk[i] for i in share]
                part = Share(self.collate(mine or chunk[:1]), len(mine))
                yield Told(part, position, _pickled(self._state())) if worker and tells else part
            step += 1

    def _state(self) -> dict[str, Any] | None:
        return None if self._resumable is None else self._resumable.state()

    def _load(self, epoch: int, start: int) -> bool:
        """Let the source begin at the position that a checkpoint has, if it has this one."""
        if self._begin is None or self._resumable is None or self._begin[:2] != (epoch, start):
            return False  # loader processes that outlive an epoch still hold the first one's
        return self._resumable.load(self._begin[2])


class StreamLoader(DataLoader[Any]):
    """Loads a ``RankStream``; states that come with micro-batches from loader processes stay here.

    They are pickled there already: what torch's queue cannot pickle, it loses, and waits for.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Micro-batches, as of a loader of a map-style dataset."""
        for share in self.shares():
            yield share.inputs

    def shares(self) -> Iterator[Share]:
        """Micro-batches, each with its number of samples."""
        stream: Any = self.dataset
        for part in super().__iter__():
            yield stream.note(part) if isinstance(part, Told) else part


def _pickled(state: dict[str, Any] | None) -> bytes | None:
    try:
        return None if state is None else pickle.dumps(state)
    except Exception:  # of a dataset of the user's own, anything
        return None
