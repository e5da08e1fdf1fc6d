"""A model's weights in host memory, while a thread writes them and training goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dstrain.core.adapters import has_adapters
from dstrain.core.files import FileRecord, write_json
from dstrain.core.ranks import Ranks
from dstrain.engine import full_numel, full_shape, gathered, is_partitioned, own_partition
from dstrain.models.host_copies import HostCopies
from dstrain.models.save import (
    INDEX,
    SHARD_BYTES,
    Entry,
    entries_of,
    gather_groups,
    needs_conversion,
    plan_shards,
    shard_names,
)
from dstrain.models.tensor_file import Stored, write_tensor_file

Groups = tuple[tuple[int, ...], ...]

# Shares go to the writer of their shard in messages of about this size.
_MESSAGE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Share:
    """This rank's part of a partitioned parameter.

    Attributes:
        shard: index of the shard that the parameter belongs to.
        name: of the parameter.
        shape: of the whole parameter.
        values: 1-D, padded, as long on every rank.
    """

    shard: int
    name: str
    shape: tuple[int, ...]
    values: torch.Tensor


@dataclass(frozen=True)
class HeldShards:
    """A model's weights in host memory, each rank holding what it needs to write its shards.

    Attributes:
        shards: this rank's shards: file name -> tensors.
        index: content of the index of several shards; None for a single one.
        shares: this rank's parts of partitioned parameters, in the same order on all ranks; their
            writers have not got them yet.
        names: file names of all shards.
        rank: this rank.
        groups: the ranks that write into one folder, for each folder: all shards go into each, and
            shard k is written by rank k of the group (counted around).
    """

    shards: dict[str, list[Stored]]
    index: dict[str, Any] | None
    shares: tuple[_Share, ...]
    names: tuple[str, ...]
    rank: int
    groups: Groups

    def exchanged(self, group: Any) -> HeldShards:
        """Give every share to the rank that writes it; a collective of all ranks in ``group``.

        It takes no part in training's communication, so a thread can do it beside training.
        """
        shards = {name: list(tensors) for name, tensors in self.shards.items()}
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
                    tensors = shards.setdefault(self.names[share.shard], [])
                    tensors.append(Stored.of(share.name, values.view(share.shape)))
                start += size
        return replace(self, shards=shards, shares=())

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
        records = {}
        for name, shard in self.shards.items():
            records[name] = write_tensor_file(folder / name, shard, {"format": "pt"})
        if with_index and self.index is not None:
            records[INDEX] = write_json(folder / INDEX, self.index)
        return records


def hold_shards(
    module: torch.nn.Module,
    ranks: Ranks,
    copies: HostCopies,
    *,
    groups: Groups | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> HeldShards | None:
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
        None for architectures whose layout is converted on saving, and for PEFT models, of which
        little is saved: only ``save_model`` does that.
    """
    if has_adapters(module) or needs_conversion(module):
        return None
    groups = groups or (tuple(range(ranks.world_size)),)
    beside = next(group for group in groups if ranks.rank in group)
    entries = entries_of(module)
    shards = plan_shards(entries, shard_bytes)
    names = shard_names(len(shards))
    mine: dict[str, list[Stored]] = {}
    shares: list[_Share] = []
    for number, (shard, name) in enumerate(zip(shards, names, strict=True)):
        own = beside[number % len(beside)] == ranks.rank
        whole = []
        for entry in shard:
            share = own_partition(entry.tensor) if is_partitioned(entry.tensor) else None
            if share is None:
                whole.append(entry)
            else:
                values = copies.copy(_key(entry), share)
                shares.append(_Share(number, entry.name, full_shape(entry.tensor), values))
        for group in gather_groups(whole):
            with gathered(e.tensor for e in group if isinstance(e.tensor, torch.nn.Parameter)):
                if own:
                    held = [Stored.of(e.name, copies.copy(_key(e), e.tensor)) for e in group]
                    mine.setdefault(name, []).extend(held)
                    copies.wait()  # what was gathered is freed now
    index = {
        "metadata": {"total_size": sum(e.num_bytes for e in entries)},
        "weight_map": {e.name: n for n, shard in zip(names, shards, strict=True) for e in shard},
    }
    return HeldShards(
        mine,
        index if len(names) > 1 else None,
        tuple(shares),
        tuple(names),
        ranks.rank,
        groups,
    )


def held_bytes(module: torch.nn.Module, ranks: Ranks, *, num_writers: int | None = None) -> int:
    """Bytes that held shards will take on the rank that holds most.

    Args:
        module: the model.
        ranks: facts of this process.
        num_writers: ranks that write into its folder; all of them if left out.
    """
    if has_adapters(module):
        return 0
    num_writers = num_writers or ranks.world_size
    shards = plan_shards(entries_of(module), SHARD_BYTES)
    sizes = [sum(e.num_bytes for e in shard) for shard in shards]
    shares = sum(_share_bytes(e, ranks.world_size) for shard in shards for e in shard)
    return shares + max(sum(sizes[k::num_writers]) for k in range(num_writers))


def _share_bytes(entry: Entry, world_size: int) -> int:
    if not is_partitioned(entry.tensor):
        return 0
    return -(-full_numel(entry.tensor) // world_size) * entry.tensor.element_size()


def _key(entry: Entry) -> str:
    return f"model/{entry.name}"


def _messages(shares: tuple[_Share, ...]) -> Iterator[list[_Share]]:
    """Neighbours of one shard and format together, up to the size of a message."""
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
