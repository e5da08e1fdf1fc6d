"""Location of this rank's shards of master weights and optimizer state, by parameter.

DeepSpeed keeps master weights in flat tensors, which each of its optimizer wrappers divides in
another way. A ``StateShard`` gives the place of a range of one parameter's elements in such a
tensor. So the rest of dstrain handles parameters by name, start and length, whatever the stage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from dstrain.core.errors import CheckpointError, Problem
from dstrain.engine.state.swapped import SwapFile, Swapped

MASTER = "master"
"""Key of the master weights, which the optimizer updates."""
WEIGHT = "weight"
"""Key of the values of a parameter that no optimizer updates, in the model's number format."""


@dataclass(frozen=True)
class StateShard:
    """A contiguous range of elements of one flattened parameter, which this rank has.

    Attributes:
        name: the parameter's name in the module.
        start: index of the range's first element in the whole flattened parameter.
        numel: number of elements of the range.
        shape: shape of the whole parameter.
        holder: tensor that contains the values; the optimizer's state is keyed by it.
        offset: index of the range's first element in the flattened holder.
        group: index of the parameter group; -1 if no optimizer updates the parameter.
        optimizer: the basic optimizer that has the state; None if none updates the parameter.
        swapped: files with the holder's values and state, which are offloaded to a local disk;
            None if they are in memory.
    """

    name: str
    start: int
    numel: int
    shape: tuple[int, ...]
    holder: torch.Tensor
    offset: int
    group: int = -1
    optimizer: Any = None
    swapped: Swapped | None = None

    @property
    def stop(self) -> int:
        """Return the index after the range's last element in the whole flattened parameter."""
        return self.start + self.numel

    @property
    def value_key(self) -> str:
        """Return the key of the parameter's values, as opposed to the optimizer's state."""
        return WEIGHT if self.optimizer is None else MASTER

    @property
    def state(self) -> dict[str, Any]:
        """Return the optimizer's state of the holder; empty before the first step."""
        if self.optimizer is None:
            return {}
        # With get(), since indexing a defaultdict would create an entry.
        return self.optimizer.state.get(self.holder) or {}

    def part(self, start: int, stop: int) -> StateShard:
        """Return the part of this shard from element ``start`` to ``stop`` of the parameter."""
        assert self.start <= start <= stop <= self.stop
        offset = self.offset + start - self.start
        return replace(self, start=start, numel=stop - start, offset=offset)

    def tensor_keys(self) -> list[str]:
        """Return the keys of the parameter's values and of the state tensors of the same shape.

        Raises:
            CheckpointError: a state tensor has another shape, so that no slice of it belongs to
                this shard, or a state value is neither tensor nor number.
        """
        keys = [self.value_key]
        for key, value in self.state.items():
            if not isinstance(value, (torch.Tensor, bool, int, float, type(None))):
                raise CheckpointError(
                    Problem(
                        f"optimizer state {key!r} of {self.name} is a {type(value).__name__}",
                        "only tensors and single numbers can be saved by slices",
                        "set checkpoint_format to deepspeed, which resumes at the same topology "
                        "only; or use another optimizer",
                    )
                )
            if not isinstance(value, torch.Tensor) or self.is_number(key):
                continue
            if value.shape != self.holder.shape:
                raise CheckpointError(
                    Problem(
                        f"optimizer state {key!r} of {self.name} has shape {tuple(value.shape)}",
                        f"only state of the parameter's own shape {tuple(self.holder.shape)}, and "
                        "single numbers, can be saved by slices",
                        "set zero_stage to 1 or more, where optimizers get flat slices and "
                        "adafactor keeps whole moments; or checkpoint_format to deepspeed, which "
                        "resumes at the same topology only; or use another optimizer",
                    )
                )
            keys.append(key)
        return keys

    def is_number(self, key: str) -> bool:
        """Tell whether a tensor of the state is a single number, such as a step count.

        At stage 0 a parameter of shape () has moments of shape () too. They are told from numbers
        by the state of a parameter with dimensions, whose tensor of the same key has dimensions if
        it is a moment.
        """
        value = self.state[key]
        if key == "step" or value.dim() or self.holder.dim():
            return is_scalar(key, value, self.holder)
        for holder, state in self.optimizer.state.items():
            other = state.get(key) if isinstance(holder, torch.Tensor) and holder.dim() else None
            if isinstance(other, torch.Tensor):
                return is_scalar(key, other, holder)
        return False

    def read(self, key: str) -> torch.Tensor:
        """Return the shard's values, 1-D and on their device; a view if the tensor is contiguous.

        Values that are offloaded to a disk are read from there.

        Args:
            key: ``value_key``, or the key of a state tensor.
        """
        file = self._file(key)
        if file is not None:
            return file.read(self.offset, self.numel)
        return self._tensor(key).detach().reshape(-1).narrow(0, self.offset, self.numel)

    def write(self, key: str, start: int, values: torch.Tensor) -> None:
        """Set values of the shard.

        Args:
            key: ``value_key``, or the key of a state tensor.
            start: index of the first value in the whole flattened parameter.
            values: 1-D.
        """
        target = self._tensor(key).detach()
        offset = self.offset + start - self.start
        file = self._file(key)
        if file is not None:
            file.write(offset, values)
            return
        if target.is_contiguous():
            target.view(-1).narrow(0, offset, values.numel()).copy_(values)
            return
        flat = target.reshape(-1)
        flat.narrow(0, offset, values.numel()).copy_(values)
        target.copy_(flat.view(target.shape))

    def dtype_of(self, key: str) -> torch.dtype:
        """Return the number format of the values that ``read`` returns."""
        file = self._file(key)
        return self._tensor(key).dtype if file is None else file.dtype

    def is_on_disk(self, key: str) -> bool:
        """Tell whether the values of a key are offloaded to a local disk."""
        return self._file(key) is not None

    def copied(self, key: str) -> torch.Tensor:
        """Return a copy of the values in host memory; on the disk, if they are offloaded there."""
        file = self._file(key)
        if file is not None:
            return file.copied(self.offset, self.numel)
        return self.read(key).to("cpu", copy=True)

    def _file(self, key: str) -> SwapFile | None:
        """Return the file with the values of a key; None if they are in memory."""
        return None if self.swapped is None else self.swapped.file(self._tensor(key))

    def _tensor(self, key: str) -> torch.Tensor:
        """Return the tensor of a key, of which the shard is a part."""
        return self.holder if key == self.value_key else self.state[key]


def is_scalar(key: str, value: torch.Tensor, holder: torch.Tensor) -> bool:
    """Tell whether a tensor in the state of a holder with dimensions is a single number.

    Args:
        key: of the tensor in the state; "step" is a number also with the shape (1,).
        value: the tensor.
        holder: the tensor to whose state it belongs.
    """
    if key == "step":
        return value.numel() == 1
    return value.dim() == 0 and holder.dim() > 0


def shards_to_write(
    shards: list[StateShard], *, replicated: bool, rank: int, world_size: int
) -> list[StateShard]:
    """Return the shards that this rank writes, so that one rank writes each element.

    Args:
        shards: all shards of this rank.
        replicated: whether every rank has the optimized parameters whole (stage 0).
        rank: this rank.
        world_size: number of ranks.
    """
    whole = [r for r in shards if _is_on_all_ranks(r, replicated=replicated)]
    total = sum(r.numel for r in whole)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    mine = []
    position = 0
    for shard in shards:
        if not _is_on_all_ranks(shard, replicated=replicated):
            mine.append(shard)
            continue
        low, high = max(first, position), min(last, position + shard.numel)
        if low < high:
            begin = shard.start + low - position
            mine.append(shard.part(begin, begin + high - low))
        position += shard.numel
    return mine


def _is_on_all_ranks(shard: StateShard, *, replicated: bool) -> bool:
    """Tell whether every rank has the values of a shard."""
    if shard.optimizer is not None:
        return replicated
    return not hasattr(shard.holder, "ds_numel")  # a ds_tensor of stage 3 is this rank's alone
