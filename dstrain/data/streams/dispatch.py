"""Stream that only the main rank reads and whose samples it sends to the other ranks."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset

from dstrain.core.errors import DataError, Problem
from dstrain.core.ranks import PATIENCE, broadcast_object, is_distributed
from dstrain.data.streams.resumable import Resumable, set_source_epoch


class Dispatched(IterableDataset[Any]):
    """Stream over a source that only one rank can read, or that gives each reader other samples.

    All ranks must iterate in step, in the training process: each block of samples is a collective.
    """

    def __init__(self, source: Iterable[Any], *, is_main: bool, block: int) -> None:
        """Wrap a stream; a collective of all ranks.

        Args:
            source: the stream, read on the main rank only.
            is_main: whether this is the main rank.
            block: number of samples to send together.
        """
        self._source, self._is_main, self._block = source, is_main, block
        self._resumable = Resumable.of(source) if is_main else None
        if self._resumable is not None:
            self._source = self._resumable.source
        self._begins_inside = False
        self._ahead = 0  # samples that were sent and not yet yielded
        self._group: Any = None
        if is_distributed():
            import torch.distributed as dist

            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def __len__(self) -> int:
        """Return the length of this rank's source; only the main rank's is meaningful."""
        return len(self._source)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the source, by its ``set_epoch`` or its generator."""
        set_source_epoch(self._source, epoch)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the source's state on the main rank; None elsewhere or if it is not exact."""
        return None if self._resumable is None or self._ahead else self._resumable.state()

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Set the next iteration to begin at ``state``; return False if refused; a collective."""
        loaded = self._resumable is not None and self._resumable.load(state)
        self._begins_inside = broadcast_object(loaded, group=self._group)
        return self._begins_inside

    def __iter__(self) -> Iterator[Any]:
        """Yield the source's samples, on every rank.

        Raises:
            DataError: the source failed; raised on all ranks.
        """
        # A generator, so that ``_next`` calls the source's ``__iter__`` and reports its failure.
        samples = (sample for source in self._sources() for sample in source)
        while True:
            block, failure = self._next(samples)
            if failure:
                raise DataError(Problem("the stream failed on the main rank", failure))
            if self._begins_inside and self._resumable is not None:
                self._resumable.begun()
            self._begins_inside = False
            for given, sample in enumerate(block, start=1):
                self._ahead = len(block) - given
                yield sample
            if len(block) < self._block:
                return

    def _sources(self) -> Iterator[Iterable[Any]]:
        if self._is_main:
            yield self._source

    def _next(self, samples: Iterator[Any]) -> tuple[list[Any], str]:
        block: list[Any] = []
        sent, failure = b"", ""
        if self._is_main:
            try:
                block = list(islice(samples, self._block))
                sent = pickle.dumps(block)
            except Exception as error:  # the other ranks wait in the broadcast below
                failure = f"{type(error).__name__}: {error}"
        sent, failure = broadcast_object((sent, failure), group=self._group)
        if not self._is_main and not failure:
            block = pickle.loads(sent)  # trusted: sent by a rank of this run
        return block, failure
