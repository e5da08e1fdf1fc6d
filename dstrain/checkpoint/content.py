"""What goes into a checkpoint: this rank's slices, copied to host memory or read when written."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from dstrain.checkpoint.folders import STATE
from dstrain.core.ranks import Ranks
from dstrain.engine import Engine, Region, full_shape, read_scalars, regions, share
from dstrain.models import HostCopies, Stored

BUFFERS = f"{STATE}/buffers.safetensors"
RUN = f"{STATE}/run.json"
LAYOUT = f"{STATE}/layout.json"


def slice_file(rank: int) -> str:
    """Path of a rank's slices in a checkpoint."""
    return f"{STATE}/rank-{rank:05d}.safetensors"


def rank_file(rank: int) -> str:
    """Path of what else only one rank knows, in JSON."""
    return f"{STATE}/rank-{rank:05d}.json"


def is_of_a_rank(name: str) -> bool:
    """Whether a file of a checkpoint has what only one rank knows."""
    return name.startswith(f"{STATE}/rank-")


@dataclass(frozen=True)
class Slices:
    """The slices that one rank writes.

    Attributes:
        tensors: under "<key>/<parameter>", 1-D.
        metadata: of the file: spans (parameter -> [start, numel]) and scalars, in JSON.
    """

    tensors: list[Stored]
    metadata: dict[str, str]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(stored.num_bytes for stored in self.tensors)

    def copied(self, copies: HostCopies) -> Slices:
        """The same values in host memory of their own, so that training can go on."""
        return Slices(
            [Stored.of(s.name, copies.copy(f"slice/{s.name}", s.load())) for s in self.tensors],
            self.metadata,
        )


def own_slices(engine: Engine, ranks: Ranks) -> Slices:
    """What this rank writes: its share of master weights, optimizer state and frozen weights.

    Raises:
        CheckpointError: optimizer state that cannot be taken apart.
    """
    replicated = engine.resolved.stage == 0
    held = regions(engine)
    mine = share(held, replicated=replicated, rank=ranks.rank, world_size=ranks.world_size)
    tensors = [_stored(region, key) for region in mine for key in region.tensor_keys()]
    spans = {region.name: [region.start, region.numel] for region in mine}
    scalars = {name: numbers for name, numbers in read_scalars(held).items() if name in spans}
    metadata = {"spans": json.dumps(spans), "scalars": json.dumps(scalars)}
    return Slices(tensors, metadata)


def parameter_shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by name."""
    return {name: full_shape(p) for name, p in engine.module.named_parameters()}


def buffers(module: torch.nn.Module) -> list[Stored]:
    """The module's persistent buffers."""
    persistent = module.state_dict(keep_vars=True)
    return [Stored.of(n, b) for n, b in module.named_buffers() if n in persistent]


def _stored(region: Region, key: str) -> Stored:
    values = region.read(key)
    return Stored(f"{key}/{region.name}", (region.numel,), values.dtype, lambda: region.read(key))
