"""Content of a checkpoint's files: slices and buffers, copied to host memory or read on writing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from dstrain.checkpoint.folders import STATE
from dstrain.checkpoint.slice_table import Numbers, RankSlices
from dstrain.core.files import FileRecord
from dstrain.core.ranks import Ranks
from dstrain.engine import (
    Engine,
    Slot,
    StateShard,
    empty_slots_of,
    full_shape,
    read_scalars,
    shards_to_write,
    slots_of,
)
from dstrain.models import DTYPES, HostCopies, Stored, write_tensor_file

BUFFERS = f"{STATE}/buffers.safetensors"
OTHER_BUFFERS = f"{STATE}/other_buffers.safetensors"
EMPTY = "empty"
"""Key in the metadata of a file of buffers, with the names of registered buffers that are None."""
RUN = f"{STATE}/run.json"
LAYOUT = f"{STATE}/layout.json"
TABLE = f"{STATE}/slices.safetensors"
"""The table of all ranks' slices."""


def slice_file(rank: int) -> str:
    """Return the path of a rank's slices inside a checkpoint."""
    return f"{STATE}/rank-{rank:05d}.safetensors"


def rank_file(rank: int) -> str:
    """Return the path of a rank's JSON file, which has its random state, in a checkpoint."""
    return f"{STATE}/rank-{rank:05d}.json"


def buffer_file(rank: int) -> str:
    """Return the path of the buffers that only this rank has, inside a checkpoint."""
    return f"{STATE}/rank-{rank:05d}-buffers.safetensors"


def is_rank_file(name: str) -> bool:
    """Tell whether a file of a checkpoint belongs to one rank."""
    return name.startswith(f"{STATE}/rank-")


@dataclass(frozen=True)
class Slices:
    """Slices that a rank writes into its file.

    Attributes:
        tensors: 1-D tensors named "<key>/<parameter>".
        about: runs of the parameters, and single numbers of the optimizer's state.
        on_disk: name of each tensor that is offloaded to a local disk -> function that copies it
            on that disk.
    """

    tensors: list[Stored]
    about: RankSlices
    on_disk: Mapping[str, Callable[[], torch.Tensor]] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, str]:
        """Return the metadata of the file, in JSON."""
        return metadata_of(self.about.spans, self.about.scalars)

    @property
    def num_bytes(self) -> int:
        """Count the bytes of all tensors."""
        return sum(stored.num_bytes for stored in self.tensors)

    def copied(self, copies: HostCopies) -> Slices:
        """Copy the values, so that training can go on: in host memory, or on their disk."""

        def copy(stored: Stored) -> torch.Tensor:
            on_disk = self.on_disk.get(stored.name)
            if on_disk is not None:
                return on_disk()
            return copies.copy(f"slice/{stored.name}", stored.load())

        return Slices([Stored.of(s.name, copy(s)) for s in self.tensors], self.about)


def metadata_of(
    spans: Mapping[str, Sequence[int]], scalars: Mapping[str, Numbers]
) -> dict[str, str]:
    """Return the metadata of a file of slices: runs of parameters and their numbers, in JSON."""
    return {"spans": json.dumps(spans), "scalars": json.dumps(scalars)}


@dataclass(frozen=True)
class Buffers:
    """Content of a file of buffers.

    Attributes:
        tensors: the buffers by their names.
        empty: names of registered buffers that are None.
    """

    tensors: list[Stored]
    empty: tuple[str, ...] = ()

    def copied(self, copies: HostCopies | None, kind: str = "buffer") -> Buffers:
        """Copy the buffers into host memory, so that training can go on.

        Args:
            copies: makes the copies; None returns the buffers uncopied.
            kind: prefix that separates these copies from other tensors of the same names.
        """
        if copies is None:
            return self
        found = [(s.name, copies.copy(f"{kind}/{s.name}", s.load())) for s in self.tensors]
        return Buffers([Stored.of(name, values) for name, values in found], self.empty)

    def write(self, folder: Path, name: str) -> dict[str, FileRecord]:
        """Write the file unless there are no buffers; return the records of written files.

        Raises:
            OSError: the disk is full, the folder is gone, and so on.
        """
        if not self.tensors and not self.empty:
            return {}
        metadata = {EMPTY: json.dumps(self.empty)} if self.empty else None
        return {name: write_tensor_file(folder / name, self.tensors, metadata)}


def rank_slices(engine: Engine, ranks: Ranks) -> Slices:
    """Return this rank's share of master weights, optimizer state and frozen weights.

    Raises:
        CheckpointError: optimizer state cannot be split by parameter.
    """
    replicated = engine.resolved.stage == 0
    held = engine.state.shards()
    mine = shards_to_write(
        held, replicated=replicated, rank=ranks.rank, world_size=ranks.world_size
    )
    tensors = [_stored(shard, key) for shard in mine for key in shard.tensor_keys()]
    on_disk = {
        _name(shard, key): partial(shard.copied, key)
        for shard in mine
        for key in shard.tensor_keys()
        if shard.is_on_disk(key)
    }
    spans = {shard.name: (shard.start, shard.numel) for shard in mine}
    scalars = {name: numbers for name, numbers in read_scalars(held).items() if name in spans}
    about = RankSlices.of([stored.name for stored in tensors], spans, scalars)
    return Slices(tensors, about, on_disk)


def parameter_shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name."""
    return {name: full_shape(p) for name, p in engine.module.named_parameters()}


def formats(engine: Engine) -> dict[str, str]:
    """Return the dtype of every parameter that is not in the run's dtype, by parameter name."""
    run = DTYPES[engine.resolved.precision]
    named = engine.module.named_parameters()
    return {name: str(p.dtype).removeprefix("torch.") for name, p in named if p.dtype != run}


def buffers(module: torch.nn.Module) -> Buffers:
    """Return a module's persistent buffers under their registered names.

    Hooks may rename them in the ``state_dict``; such names are not used.
    """
    return buffer_contents(
        [s for s in [*slots_of(module), *empty_slots_of(module)] if s.persistent]
    )


def buffer_contents(slots: Sequence[Slot]) -> Buffers:
    """Return the values of the buffers in ``slots``, and the names of those that are None."""
    return Buffers(
        [Stored.of(slot.name, slot.tensor.detach()) for slot in slots if not slot.is_empty],
        tuple(slot.name for slot in slots if slot.is_empty),
    )


def _name(shard: StateShard, key: str) -> str:
    """Return the name of a slice in its file."""
    return f"{key}/{shard.name}"


def _stored(shard: StateShard, key: str) -> Stored:
    shape, dtype = (shard.numel,), shard.dtype_of(key)
    return Stored(_name(shard, key), shape, dtype, lambda: shard.read(key))
