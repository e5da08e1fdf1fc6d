"""Division of a model's saved tensors into files, and their conversion from the model's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dstrain.engine import is_partitioned
from dstrain.models.layout import Entry, Group, Saved
from dstrain.models.tensor_file import Stored

SHARD_BYTES = 5 * 10**9
# Parameters are gathered in batches, since each gather costs a latency; small beside a shard.
GATHER_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Portion:
    """A part of a group in one file: the whole group, unless it is larger than a shard.

    Attributes:
        group: tensors that are converted together.
        saved: the saved tensors of the group that are in this file.
    """

    group: Group
    saved: tuple[Saved, ...]

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Return the model's tensors from which the saved tensors are converted."""
        return self.group.entries

    @property
    def num_bytes(self) -> int:
        """Return the number of bytes that the portion takes in the file."""
        return sum(saved.num_bytes for saved in self.saved)

    def stored(self, load: Callable[[], Sequence[torch.Tensor]]) -> list[Stored]:
        """Return the tensors to write, which are converted when the first of them is loaded.

        Args:
            load: returns the whole tensors of ``entries``, in host memory.
        """
        made = _PortionTensors(self, load)
        return [Stored(s.name, s.shape, s.dtype, partial(made.take, s.name)) for s in self.saved]


class _PortionTensors:
    """Converts the tensors of a portion once, and returns each of them once."""

    def __init__(self, portion: Portion, load: Callable[[], Sequence[torch.Tensor]]) -> None:
        """Prepare to convert the tensors that ``load`` returns."""
        self._portion = portion
        self._load: Callable[[], Sequence[torch.Tensor]] | None = load
        self._made: dict[str, torch.Tensor] = {}

    def take(self, name: str) -> torch.Tensor:
        """Return a tensor by its saved name, keeping no reference to it."""
        if self._load is not None:
            made = self._portion.group.convert(self._load())
            self._made = {saved.name: made[saved.name] for saved in self._portion.saved}
            self._load = None
        return self._made.pop(name)


def plan_shards(groups: Sequence[Group], shard_bytes: int) -> list[list[Portion]]:
    """Divide groups in order into shards of at most ``shard_bytes``.

    A tensor that is larger than that gets a shard to itself.
    """
    shards: list[list[Portion]] = [[]]
    filled = 0
    for portion in _portions(groups, shard_bytes):
        if shards[-1] and filled + portion.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(portion)
        filled += portion.num_bytes
    return shards


def _portions(groups: Sequence[Group], shard_bytes: int) -> Iterator[Portion]:
    """Yield groups as portions, dividing groups that are larger than a shard."""
    for group in groups:
        part: list[Saved] = []
        for saved in group.saved:
            if part and sum(s.num_bytes for s in part) + saved.num_bytes > shard_bytes:
                yield Portion(group, tuple(part))
                part = []
            part.append(saved)
        yield Portion(group, tuple(part))


def shard_names(count: int) -> list[str]:
    """Return the file names of ``count`` shards."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def gather_batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Yield lists of successive tensors that are gathered together."""
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        taken = entry.num_bytes if is_partitioned(entry.tensor) else 0
        if batch and taken and size + taken > GATHER_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += taken
    if batch:
        yield batch


def parameters_of(batch: Iterable[Entry]) -> list[torch.nn.Parameter]:
    """Return the parameters among the tensors of a batch."""
    return [e.tensor for e in batch if isinstance(e.tensor, torch.nn.Parameter)]


def index_of(plan: Sequence[Sequence[Portion]], names: Sequence[str]) -> dict[str, Any]:
    """Return the content of the index file, which maps tensors to files."""
    weight_map = {
        saved.name: name
        for name, shard in zip(names, plan, strict=True)
        for portion in shard
        for saved in portion.saved
    }
    total = sum(portion.num_bytes for shard in plan for portion in shard)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
