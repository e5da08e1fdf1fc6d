"""Location of this rank's shards in the flat tensors of DeepSpeed's optimizer wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dstrain.core.errors import CheckpointError, Problem
from dstrain.engine.state.shards import StateShard
from dstrain.engine.state.swapped import Swapped, SwappedParameter, SwappedSubGroup
from dstrain.engine.zero import full_numel, full_shape, is_on_disk, is_partitioned


def locate_shards(module: torch.nn.Module, optimizer: Any) -> list[StateShard]:
    """Return all shards of this rank, in the order of the module's parameters.

    At stage 0 each rank has everything, at the other stages its partition. Frozen parameters are
    whole on each rank below stage 3.

    Args:
        module: the model.
        optimizer: DeepSpeed's wrapper, or the basic optimizer where there is none.

    Raises:
        CheckpointError: expert parallelism or an optimizer wrapper of unknown layout.
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
    """Yield this rank's shards at stage 3."""
    import torch.distributed as dist

    rank = dist.get_rank(group=optimizer.dp_process_group)
    for index, group in enumerate(optimizer.fp16_groups):
        holder = optimizer.fp32_partitioned_groups_flat[index]
        swapped: Swapped | None = None
        if optimizer._swappable_optimizer_subgroup(index):  # small sub-groups stay in memory
            swapped = SwappedSubGroup(optimizer.optimizer_swapper, holder)
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
                holder,
                offset,
                optimizer.sub_group_to_group_id[index],
                inner,
                swapped,
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
    swapped = SwappedParameter(parameter) if is_on_disk(parameter) else None
    shape, holder = full_shape(parameter), parameter.ds_tensor
    return StateShard(name, begin, numel, shape, holder, 0, swapped=swapped)


def _unknown(what: str) -> CheckpointError:
    """Return the error for optimizer state that cannot be located."""
    return CheckpointError(
        Problem(
            f"a checkpoint of {what}",
            "dstrain cannot divide its optimizer state by parameters yet",
            "set save_strategy to no, or save_only_model",
        )
    )
