"""Location of this rank's shards of master weights and optimizer state, by parameter.

DeepSpeed keeps master weights in flat tensors, which each of its optimizer wrappers divides in
another way. A ``StateShard`` gives the place of a range of one parameter's elements in such a
tensor. So the rest of dstrain handles parameters by name, start and length, whatever the stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from dstrain.core.errors import CheckpointError, Problem
from dstrain.engine.zero import full_numel, full_shape, is_partitioned

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
    """

    name: str
    start: int
    numel: int
    shape: tuple[int, ...]
    holder: torch.Tensor
    offset: int
    group: int = -1
    optimizer: Any = None

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

        Args:
            key: ``value_key``, or the key of a state tensor.
        """
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
        if target.is_contiguous():
            target.view(-1).narrow(0, offset, values.numel()).copy_(values)
            return
        flat = target.reshape(-1)
        flat.narrow(0, offset, values.numel()).copy_(values)
        target.copy_(flat.view(target.shape))

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


def locate_shards(module: torch.nn.Module, optimizer: Any) -> list[StateShard]:
    """Return all shards of this rank, in the order of the module's parameters.

    At stage 0 each rank has everything, at the other stages its partition. Frozen parameters are
    whole on each rank below stage 3.

    Args:
        module: the model.
        optimizer: DeepSpeed's wrapper, or the basic optimizer where there is none.

    Raises:
        CheckpointError: state on NVMe, expert parallelism or an optimizer wrapper of unknown
            layout.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    order = {name: index for index, name in enumerate(names.values())}
    found = list(_optimized(optimizer, names))
    optimized = set(optimized_names(module, optimizer))
    for name, parameter in module.named_parameters():
        if name not in optimized:
            found.append(_frozen(name, parameter))
    return sorted((s for s in found if s.numel > 0), key=lambda s: (order[s.name], s.start))


def optimized_names(module: torch.nn.Module, optimizer: Any) -> list[str]:
    """Return the names of all parameters that an optimizer updates, on any rank."""
    kinds = ("fp16_groups", "bit16_groups", "bf16_groups")  # stages 3 and 0, 1-2, BF16_Optimizer
    groups = next((getattr(optimizer, kind) for kind in kinds if hasattr(optimizer, kind)), None)
    if groups is None:
        groups = [group["params"] for group in optimizer.param_groups]
    known = {id(p) for group in groups for p in group}
    return [name for name, p in module.named_parameters() if id(p) in known]


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


def _optimized(optimizer: Any, names: dict[int, str]) -> Iterator[StateShard]:
    """Yield this rank's shards of optimized parameters, by the layout of DeepSpeed's wrapper.

    Args:
        optimizer: DeepSpeed's wrapper, or the basic optimizer.
        names: ``id`` of a parameter -> name.

    Raises:
        CheckpointError: the layout is not known.
    """
    if getattr(optimizer, "has_moe_layers", False):
        raise _unknown("a model with expert parallelism")
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        yield from _stage_three(optimizer, names)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        yield from _stages_one_and_two(optimizer, names)
    elif hasattr(optimizer, "fp32_groups_flat_partition"):
        yield from _bf16_optimizer(optimizer, names)
    elif hasattr(optimizer, "fp32_groups_flat"):
        for index, group in enumerate(optimizer.fp16_groups):
            flat, inner = optimizer.fp32_groups_flat[index], optimizer.optimizer
            offset = 0
            for p in group:
                yield StateShard(
                    names[id(p)], 0, p.numel(), tuple(p.shape), flat, offset, index, inner
                )
                offset += p.numel()
    elif hasattr(optimizer, "fp32_groups"):
        for index, group in enumerate(optimizer.fp16_groups):
            for p, master in zip(group, optimizer.fp32_groups[index], strict=True):
                name, inner = names[id(p)], optimizer.optimizer
                yield StateShard(name, 0, p.numel(), tuple(p.shape), master, 0, index, inner)
    elif isinstance(optimizer, torch.optim.Optimizer):
        for index, values in enumerate(optimizer.param_groups):
            for p in values["params"]:
                yield StateShard(names[id(p)], 0, p.numel(), tuple(p.shape), p, 0, index, optimizer)
    else:
        raise _unknown(f"DeepSpeed's {type(optimizer).__name__}")


def _stages_one_and_two(optimizer: Any, names: dict[int, str]) -> Iterator[StateShard]:
    """Yield this rank's shards at stages 1 and 2."""
    for index, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        yield from _cut(
            optimizer,
            index,
            # Round-robin partitioning changes the order of the group's parameters.
            zip(
                optimizer.round_robin_bit16_groups[index],
                optimizer.round_robin_bit16_offsets[index],
                strict=True,
            ),
            flat,
            names,
        )


def _bf16_optimizer(optimizer: Any, names: dict[int, str]) -> Iterator[StateShard]:
    """Yield this rank's shards in DeepSpeed's ``BF16_Optimizer``."""
    for index, flat in enumerate(optimizer.fp32_groups_flat_partition):
        offsets, position = [], 0
        for parameter in optimizer.bf16_groups[index]:
            offsets.append(position)
            position += parameter.numel()
        placed = zip(optimizer.bf16_groups[index], offsets, strict=True)
        yield from _cut(optimizer, index, placed, flat, names)


def _cut(
    optimizer: Any, group: int, placed: Any, flat: torch.Tensor, names: dict[int, str]
) -> Iterator[StateShard]:
    """Yield the shards in this rank's partition of the flat tensor of a group.

    Args:
        optimizer: DeepSpeed's wrapper.
        group: index of the parameter group.
        placed: the group's parameters with their offsets in the whole flat tensor.
        flat: this rank's partition.
        names: ``id`` of a parameter -> name.
    """
    import torch.distributed as dist

    size = flat.numel()
    begin = dist.get_rank(group=optimizer.real_dp_process_group[group]) * size
    for parameter, place in placed:
        low = max(begin, place)
        high = max(low, min(begin + size, place + parameter.numel()))
        yield StateShard(
            names[id(parameter)],
            low - place,
            high - low,
            tuple(parameter.shape),
            flat,
            low - begin,
            group,
            optimizer.optimizer,
        )


def _stage_three(optimizer: Any, names: dict[int, str]) -> Iterator[StateShard]:
    """Yield this rank's shards at stage 3.

    Raises:
        CheckpointError: state is offloaded to NVMe.
    """
    import torch.distributed as dist

    rank = dist.get_rank(group=optimizer.dp_process_group)
    for index, group in enumerate(optimizer.fp16_groups):
        swapped = optimizer._swappable_optimizer_subgroup(index)
        if swapped or optimizer.fp16_partitioned_groups_flat[index] is None:
            raise _unknown("state that is offloaded to NVMe")
        inner = optimizer.optimizer
        if optimizer.offload_optimizer and optimizer.subgroup_to_device[index] != "cpu":
            inner = optimizer.backup_optimizer  # for state that an offload ratio < 1 leaves here
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()
            begin = min(rank * size, parameter.ds_numel)
            yield StateShard(
                names[id(parameter)],
                begin,
                min(size, parameter.ds_numel - begin),  # the last partition is padded
                full_shape(parameter),
                optimizer.fp32_partitioned_groups_flat[index],
                offset,
                optimizer.sub_group_to_group_id[index],
                inner,
            )
            offset += size


def _frozen(name: str, parameter: Any) -> StateShard:
    """Return this rank's shard of a parameter that no optimizer updates."""
    if not is_partitioned(parameter):
        return StateShard(name, 0, parameter.numel(), tuple(parameter.shape), parameter, 0)
    import torch.distributed as dist

    size, total = parameter.partition_numel(), full_numel(parameter)
    begin = min(dist.get_rank(group=parameter.ds_process_group) * size, total)
    numel = min(size, total - begin)
    return StateShard(name, begin, numel, full_shape(parameter), parameter.ds_tensor, 0)


def _unknown(what: str) -> CheckpointError:
    """Return the error for optimizer state that cannot be located."""
    return CheckpointError(
        Problem(
            f"a checkpoint of {what}",
            "dstrain cannot divide its optimizer state by parameters yet",
            "set save_strategy to no, or save_only_model",
        )
    )
