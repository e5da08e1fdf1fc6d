"""A copy of a model's weights in host memory, which a thread writes while training continues."""

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

# Ranks send partitions to the writer of their shard in messages of about this size.
_MESSAGE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Share:
    """This rank's partition of a parameter.

    Attributes:
        shard: index of a shard for which the parameter is needed.
        name: name of the parameter in the model.
        shape: shape of the whole parameter.
        values: the partition, 1-D and padded to the same length on every rank.
    """

    shard: int
    name: str
    shape: tuple[int, ...]
    values: torch.Tensor


@dataclass(frozen=True)
class WeightSnapshot:
    """A copy of a model's weights in host memory, divided among the ranks.

    Attributes:
        plan: the content of each shard.
        whole: whole tensors that this rank needs for its shards: (index of shard, name) -> tensor.
        shares: this rank's partitions of parameters, in the same order on all ranks; ``exchanged``
            sends them to the ranks that write them.
        rank: this rank.
        groups: for each folder the ranks that write into it. All shards are written into each
            folder; shard k is written by member k of its group, modulo the group's size.
    """

    plan: tuple[tuple[Portion, ...], ...]
    whole: dict[tuple[int, str], torch.Tensor]
    shares: tuple[_Share, ...]
    rank: int
    groups: Groups

    @property
    def rank_shards(self) -> list[int]:
        """Return the indices of the shards that this rank writes."""
        return _shards_of_rank(len(self.plan), self.rank, self.groups)

    def exchanged(self, group: Any) -> WeightSnapshot:
        """Return a snapshot in which writers have whole parameters; a collective of all ranks.

        Sends all partitions to the ranks that write them. A thread can call this during training,
        since it does not use training's process group.

        Args:
            group: a process group of all ranks for host memory.
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
        """Send data to a writer; return that of all ranks on the writer, and None elsewhere."""
        import torch.distributed as dist

        world_size = sum(map(len, self.groups))
        parts = [torch.empty_like(data) for _ in range(world_size)] if writer == self.rank else None
        dist.gather(data, parts, dst=writer, group=group)
        return parts

    def write(self, folder: Path, *, with_index: bool) -> dict[str, FileRecord]:
        """Write this rank's shards, and wait until they are on the disk.

        Args:
            folder: where to write.
            with_index: whether to write the index too, if there are several shards.

        Returns:
            records of the written files by name.

        Raises:
            OSError: a file cannot be written.
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
        """Return the model's tensors of a portion of a shard."""
        return [self.whole[number, entry.name] for entry in portion.entries]


def snapshot_weights(
    module: torch.nn.Module,
    ranks: Ranks,
    copies: HostCopies,
    *,
    groups: Groups | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> WeightSnapshot | None:
    """Copy the weights into host memory; a collective of all ranks.

    Every rank copies only its partition of a partitioned parameter, and ``exchanged`` sends it to
    its writer later. Gathering all parameters here would delay training.

    Args:
        module: the model.
        ranks: rank of this process, and the number of ranks.
        copies: makes the copies, in a round that the caller begins and ends.
        groups: for each folder the ranks that write into it; by default all ranks write into one.
        shard_bytes: maximum size of a shard; a larger tensor gets a shard to itself.

    Returns:
        None for PEFT models, whose adapters are small enough for ``save_model``.
    """
    if has_adapters(module):
        return None
    groups = groups or (tuple(range(ranks.world_size)),)
    plan = plan_shards(groups_of(module), shard_bytes)
    mine = set(_shards_of_rank(len(plan), ranks.rank, groups))
    copied: dict[str, torch.Tensor] = {}

    def copy(entry: Entry, values: torch.Tensor) -> torch.Tensor:
        # Several shards need the same tensors if their group is larger than a shard.
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
                    copies.wait()  # the gathered parameters are freed after this block
    return WeightSnapshot(tuple(map(tuple, plan)), whole, tuple(shares), ranks.rank, groups)


def _shards_of_rank(count: int, rank: int, groups: Groups) -> list[int]:
    """Return the indices of the shards, out of ``count``, that a rank writes."""
    beside = next(group for group in groups if rank in group)
    return [number for number in range(count) if beside[number % len(beside)] == rank]


def snapshot_bytes(module: torch.nn.Module, ranks: Ranks, *, num_writers: int | None = None) -> int:
    """Return the bytes of a snapshot on the rank that needs most.

    Args:
        module: the model.
        ranks: rank of this process, and the number of ranks.
        num_writers: number of ranks that write into a folder; all ranks by default.
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
    """Return the bytes of a rank's partition; 0 for a tensor that is not partitioned."""
    if not is_partitioned(entry.tensor):
        return 0
    return -(-full_numel(entry.tensor) // world_size) * entry.tensor.element_size()


def _messages(shares: tuple[_Share, ...]) -> Iterator[list[_Share]]:
    """Yield lists of successive partitions for the same shard, each up to the size of a message."""
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
    """Return a tensor's values as a 1-D tensor of bytes."""
    return values.contiguous().view(-1).view(torch.uint8)
