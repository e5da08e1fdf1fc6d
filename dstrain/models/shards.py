"""The distribution of a model's saved tensors over files, and their making from its own tensors."""

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
# Gathering parameters one by one would pay a latency for each; a batch stays small beside a shard.
GATHER_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Portion:
    """The part of a group in one file: all of it, unless the group is larger than a shard.

    Attributes:
        group: what is saved together.
        saved: the tensors of it that are in this file.
    """

    group: Group
    saved: tuple[Saved, ...]

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Return the model's tensors that it is made of."""
        return self.group.entries

    @property
    def num_bytes(self) -> int:
        """Return the bytes in the file."""
        return sum(saved.num_bytes for saved in self.saved)

    def stored(self, load: Callable[[], Sequence[torch.Tensor]]) -> list[Stored]:
        """Return the tensors to write; made when the first is written, and freed with the last.

        Args:
            load: gives the whole tensors of ``entries``, in host memory.
        """
        made = _PortionTensors(self, load)
        return [Stored(s.name, s.shape, s.dtype, partial(made.take, s.name)) for s in self.saved]


class _PortionTensors:
    """The tensors of a portion, made once and each handed out once."""

    def __init__(self, portion: Portion, load: Callable[[], Sequence[torch.Tensor]]) -> None:
        self._portion = portion
        self._load: Callable[[], Sequence[torch.Tensor]] | None = load
        self._made: dict[str, torch.Tensor] = {}

    def take(self, name: str) -> torch.Tensor:
        if self._load is not None:
            made = self._portion.group.convert(self._load())
            self._made = {saved.name: made[saved.name] for saved in self._portion.saved}
            self._load = None
        return self._made.pop(name)


def plan_shards(groups: Sequence[Group], shard_bytes: int) -> list[list[Portion]]:
    """Fill shards in order; a tensor larger than a shard has one of its own."""
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
    """Yield neighbours that are gathered together."""
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
    """Return those of the tensors that are parameters."""
    return [e.tensor for e in batch if isinstance(e.tensor, torch.nn.Parameter)]


def index_of(plan: Sequence[Sequence[Portion]], names: Sequence[str]) -> dict[str, Any]:
    """Return the content of the index: which file has which tensor."""
    weight_map = {
        saved.name: name
        for name, shard in zip(names, plan, strict=True)
        for portion in shard
        for saved in portion.saved
    }
    total = sum(portion.num_bytes for shard in plan for portion in shard)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
