"""Streams: every rank reads the same stream and keeps its own share, so topology never matters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import worker as worker_module

from dstrain.data.noise import Noise
from dstrain.data.order import Topology

_UNTOLD = -1
_END = object()


@dataclass
class Masked:
    """A micro-batch that must carry no weight: this rank had no sample left, others did."""

    inputs: Any

    def pin_memory(self) -> Masked:
        """Asked by torch's loader; this batch comes once per epoch, so it is left as it is."""
        return self


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

    def share_position(self) -> None:
        """Let loader processes that outlive an epoch see what ``set_epoch`` says of the next."""
        self._position.share_memory_()

    def set_epoch(self, epoch: int, *, start: int = 0) -> None:
        """Tell the stream its epoch, and how many samples to leave out because they were used."""
        self._position.copy_(torch.tensor([epoch, start]))
        self._tell_source(epoch)

    def _tell_source(self, epoch: int) -> None:
        generator = getattr(self.source, "generator", None)
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)
        elif isinstance(generator, torch.Generator):
            generator.manual_seed(epoch)

    def __iter__(self) -> Iterator[Any]:
        """Collated micro-batches; a stand-in at the end is wrapped in ``Masked``."""
        worker = get_worker_info()
        turn, turns = (worker.id, worker.num_workers) if worker else (0, 1)
        epoch, start = self._position.tolist()
        if worker and epoch != _UNTOLD:
            self._tell_source(epoch)
        samples = _whole(self.source) if worker else iter(self.source)
        position = step = 0
        while True:
            if worker:  # also for what is left out: the source may draw random numbers too
                Noise(self.noise_seed, epoch, self.topology.rank, position).sow()
            used = max(0, start - position)
            chunk = list(islice(samples, min(used, self.topology.chunk) or self.topology.chunk))
            position += len(chunk)
            if not chunk:
                return
            if used:
                continue
            if self.drop_last and len(chunk) < self.topology.chunk:
                return
            if step % turns == turn:
                share = self.topology.share(len(chunk))
                mine = [chunk[i] for i in share]
                yield self.collate(mine) if mine else Masked(self.collate(chunk[:1]))
            step += 1
