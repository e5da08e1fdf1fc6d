"""A snapshot of a model's weights in host memory, which a thread writes while training goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dstrain.core.adapters import has_adapters
from dstrain.core.files import FileRecord, write_json
from dstrain.core.ranks import Ranks
from dstrain.engine import full_numel, full_shape, gathered, is_partitioned, rank_partition
from dstrain.models.host_copies import HostCopies
from dstrain.models.layout import Entry, groups_of
from dstrain.models.save import INDEX
from dstrain.models.shards import (
    SHARD_BYTES,
    Portion,
    gather_batches,
    index_of,
    parameters_of,
    plan_shards,
    shard_names,
)
from dstrain.models.tensor_file import write_tensor_file

Groups = tuple[tuple[int, ...], ...]

# Shares go to the writer of their shard in messages of about this size.
_MESSAGE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Share:
    """This rank's part of a partitioned parameter.

    Attributes:
        shard: index of a shard that the parameter is needed for.
        name: of the parameter in the model.
        shape: of the whole parameter.
        values: 1-D, padded, as long on every rank.
    """

    shard: int
    name: str
    shape: tuple[int, ...]
    values: torch.Tensor


@dataclass(frozen=True)
class WeightSnapshot:
    """A model's weights in host memory, each rank holding what it needs to write its shards.

    Attributes:
        plan: what is in each shard.
        whole: whole tensors of the model that this rank writes: (index of shard, name) -> tensor.
        shares: this rank's parts of partitioned parameters, in the same order on all ranks; their
            writers have not got them yet.
        rank: this rank.
        groups: the ranks that write into one folder, for each folder: all shards go into each, and
            shard k is written by rank k of the group (counted around).
    """

    plan: tuple[tuple[Portion, ...], ...]
    whole: dict[tuple[int, str], torch.Tensor]
    shares: tuple[_Share, ...]
    rank: int
    groups: Groups

    @property
    def rank_shards(self) -> list[int]:
        """Return the numbers of the shards that this rank writes."""
        return _shards_of_rank(len(self.plan), self.rank, self.groups)

    def exchanged(self, group: Any) -> WeightSnapshot:
        """Give every share to the rank that writes it; a collective of all ranks in ``group``.

        It takes no part in training's communication, so a thread can do it beside training.
        """
        whole_tensors = dict(self.whole)
        for message in _messages(self.shares):
            data, parts = torch.cat([_as_bytes(s.values) for s in message]), None
            for group_of_writers in self.groups:
                writer = group_of_writers[message[0].shard % len(group_of_writers)]
                parts = self._gather(data, writer, group) or parts
            start = 0
            for share in message:
                size = share.values.nbytes
                if parts is not None:
                    whole = torch.cat([part[start : start + size] for part in parts])
                    values = whole.view(share.values.dtype)[: torch.Size(share.shape).numel()]
                    whole_tensors[share.shard, share.name] = values.view(share.shape)
                start += size
        return replace(self, whole=whole_tensors, shares=())

    def _gather(self, data: torch.Tensor, writer: int, group: Any) -> list[torch.Tensor] | None:
        import torch.distributed as dist

        world_size = sum(map(len, self.groups))
        parts = [torch.empty_like(data) for _ in range(world_size)] if writer == self.rank else None
        dist.gather(data, parts, dst=writer, group=group)
        return parts

    def write(self, folder: Path, *, with_index: bool) -> dict[str, FileRecord]:
        """Write this rank's shards durably, and the index if asked to.

        Raises:
            OSError: the disk is full, the folder is gone, and so on.
        """
        assert not self.shares
        names = shard_names(len(self.plan))
        records = {}
        for number in self.rank_shards:
            tensors = []
            for portion in self.plan[number]:
                tensors += portion.stored(partial(self._picked, number, portion))
            records[names[number]] = write_tensor_file(
                folder / names[number], tensors, {"format": "pt"}
            )
        if with_index and len(names) > 1:
            records[INDEX] = write_json(folder / INDEX, index_of(self.plan, names))
        return records

    def _picked(self, number: int, portion: Portion) -> list[torch.Tensor]:
        return [self.whole[number, entry.name] for entry in portion.entries]


def snapshot_weights(
    module: torch.nn.Module,
    ranks: Ranks,
    copies: HostCopies,
    *,
    groups: Groups | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> WeightSnapshot | None:
    """Copy the weights to host memory; a collective.

    Of a partitioned parameter every rank copies its own share, which its writer gets later
    (``exchanged``): gathering all of them would keep training waiting.

    Args:
        module: the model.
        ranks: facts of this process.
        copies: makes them, in a round that the caller begins and ends.
        groups: the ranks that write into one folder, for each folder; all ranks into one if left.
        shard_bytes: the largest shard; a larger tensor has one of its own.

    Returns:
        None for PEFT models, of which little is saved: only ``save_model`` does that.
    """
    if has_adapters(module):
        return None
    groups = groups or (tuple(range(ranks.world_size)),)
    plan = plan_shards(groups_of(module), shard_bytes)
    mine = set(_shards_of_rank(len(plan), ranks.rank, groups))
    copied: dict[str, torch.Tensor] = {}

    def copy(entry: Entry, values: torch.Tensor) -> torch.Tensor:
        # A group that is larger than a shard is needed for several of them.
        if entry.name not in copied:
            copied[entry.name] = copies.copy(f"model/{entry.name}", values)
        return copied[entry.name]

    whole: dict[tuple[int, str], torch.Tensor] = {}
    shares: list[_Share] = []
    for number, shard in enumerate(plan):
        entries = []
        for entry in (entry for portion in shard for entry in portion.entries):
            share = rank_partition(entry.tensor) if is_partitioned(entry.tensor) else None
            if share is None:
                entries.append(entry)
            else:
                values = copy(entry, share)
                shares.append(_Share(number, entry.name, full_shape(entry.tensor), values))
        for batch in gather_batches(entries):
            with gathered(parameters_of(batch)):
                if number in mine:
                    whole |= {(number, e.name): copy(e, e.tensor) for e in batch}
                    copies.wait()  # what was gathered is freed now
    return WeightSnapshot(tuple(map(tuple, plan)), whole, tuple(shares), ranks.rank, groups)


def _shards_of_rank(count: int, rank: int, groups: Groups) -> list[int]:
    """Return the numbers of the shards, of ``count`` in all, that a rank writes."""
    beside = next(group for group in groups if rank in group)
    return [number for number in range(count) if beside[number % len(beside)] == rank]


def snapshot_bytes(module: torch.nn.Module, ranks: Ranks, *, num_writers: int | None = None) -> int:
    """Return the bytes that a snapshot will take on the rank that holds most of it.

    Args:
        module: the model.
        ranks: facts of this process.
        num_writers: ranks that write into its folder; all of them if left out.
    """
    if has_adapters(module):
        return 0
    num_writers = num_writers or ranks.world_size
    plan = plan_shards(groups_of(module), SHARD_BYTES)
    sizes = [sum(portion.num_bytes for portion in shard) for shard in plan]
    entries = (entry for shard in plan for portion in shard for entry in portion.entries)
    shares = sum(_share_bytes(entry, ranks.world_size) for entry in entries)
    return shares + max(sum(sizes[k::num_writers]) for k in range(num_writers))


def _share_bytes(entry: Entry, world_size: int) -> int:
    if not is_partitioned(entry.tensor):
        return 0
    return -(-full_numel(entry.tensor) // world_size) * entry.tensor.element_size()


def _messages(shares: tuple[_Share, ...]) -> Iterator[list[_Share]]:
    """Yield neighbours of one shard together, up to the size of a message."""
    message: list[_Share] = []
    size = 0
    for share in shares:
        alike = message and share.shard == message[0].shard
        if message and (not alike or size + share.values.nbytes > _MESSAGE_BYTES):
            yield message
            message, size = [], 0
        message.append(share)
        size += share.values.nbytes
    if message:
        yield message


def _as_bytes(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(-1).view(torch.uint8)
