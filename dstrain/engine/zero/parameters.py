"""Partitioned parameters of ZeRO-3: their true sizes, gathering them, this rank's partition."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch

from dstrain.config import ModelFacts
from dstrain.core.errors import ModelError, Problem
from dstrain.engine.zero.scalar_parameters import scalars_as_bytes


def is_partitioned(parameter: Any) -> bool:
    """Tell whether ZeRO-3 holds this parameter as one slice per rank."""
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Return the shape of the whole parameter; a partitioned one reports (0,) itself."""
    return tuple(parameter.ds_shape if is_partitioned(parameter) else parameter.shape)


def has_scalars(parameters: Iterable[Any]) -> bool:
    """Tell whether a parameter, whole or partitioned, has the shape ()."""
    return any(full_shape(parameter) == () for parameter in parameters)


def rank_partition(parameter: torch.Tensor) -> torch.Tensor | None:
    """Return this rank's partition of a parameter as it is trained, 1-D and padded.

    Returns:
        None where the partitions of all ranks, one after another, are not the parameter: quantised
        weights, a group of some of the ranks, or a partition that is not in memory.
    """
    import torch.distributed as dist

    share: Any = parameter.ds_tensor  # type: ignore[attr-defined]
    group = parameter.ds_process_group  # type: ignore[attr-defined]
    whole_world = dist.get_world_size(group=group) == dist.get_world_size()
    there = share.numel() * dist.get_world_size() >= full_numel(parameter)
    if not whole_world or not there or hasattr(share, "ds_quant_scale"):
        return None
    return cast(torch.Tensor, share.detach())


def is_absent(parameter: Any) -> bool:
    """Tell whether a partitioned parameter has no elements at this moment."""
    return is_partitioned(parameter) and parameter.numel() == 0 and full_numel(parameter) > 0


def is_gathered(parameter: Any) -> bool:
    """Tell whether a partitioned parameter has all its elements at this moment."""
    return parameter.ds_status.name == "AVAILABLE" and parameter.shape == parameter.ds_shape


@torch.no_grad()
def updated_rank_partition(parameter: Any) -> torch.Tensor | None:
    """Copy the values of a gathered parameter into ``rank_partition``, and return that."""
    import torch.distributed as dist

    share = rank_partition(parameter)
    if share is not None and is_gathered(parameter):
        size = int(parameter.partition_numel())
        start = min(dist.get_rank(group=parameter.ds_process_group) * size, parameter.ds_numel)
        values = parameter.detach().reshape(-1)[start : start + size]
        share[: values.numel()].copy_(values)
    return share


def keep_persistent_changes(parameters: Iterable[Any]) -> None:
    """Keep changes that a user has made to parameters that stay gathered between steps.

    DeepSpeed keeps small parameters gathered, and partitions them without reading their values. The
    time grows with the number of parameters; no rank waits for another.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    for parameter in parameters:
        is_kept = is_partitioned(parameter) and getattr(parameter, "ds_persist", False)
        if is_kept and is_gathered(parameter):
            updated_rank_partition(parameter)


def full_numel(parameter: Any) -> int:
    """Return the number of elements of the whole parameter."""
    return int(parameter.ds_numel if is_partitioned(parameter) else parameter.numel())


def check_sizes(module: torch.nn.Module) -> None:
    """Refuse parameters that have no size yet.

    Raises:
        ModelError: naming them.
    """
    lazy = [name for name, p in module.named_parameters() if torch.nn.parameter.is_lazy(p)]
    if lazy:
        raise ModelError(
            Problem(
                f"parameters without a size: {', '.join(lazy[:4])}" + ", ..." * (len(lazy) > 4),
                "lazy modules choose it in their first forward pass, and the optimizer is built "
                "before that",
                "call the model once with a sample before it is passed here",
            )
        )


def model_facts(module: torch.nn.Module) -> ModelFacts:
    """Read the sizes of a module's parameters, right for partitioned ones too."""
    return ModelFacts.of_shapes((full_shape(p), p.requires_grad) for p in module.parameters())


@contextlib.contextmanager
def gathered(
    parameters: Iterable[torch.nn.Parameter],
    *,
    write_from: int | None = None,
    checks: bool = True,
) -> Iterator[None]:
    """Gather partitioned parameters inside the block; a collective of all ranks.

    Args:
        parameters: parameters to gather; those that are not partitioned are left alone.
        write_from: rank whose changes are kept and sent to all ranks; None discards changes.
        checks: let DeepSpeed's ``enable_sanity_checks`` refuse changes that are discarded; False
            where they are known and allowed.
    """
    split = [p for p in parameters if is_partitioned(p)]
    if not split:
        yield
        return
    import deepspeed

    keep_persistent_changes(split)
    whole = deepspeed.zero.GatheredParameters(split, modifier_rank=write_from)
    whole.enable_sanity_checks &= checks
    sends_scalars = write_from is not None and has_scalars(split)

    def leave(*error: Any) -> Any:
        with scalars_as_bytes(wanted=sends_scalars):
            return whole.__exit__(*error)

    with contextlib.ExitStack() as stack:
        whole.__enter__()
        stack.push(leave)
        yield


@contextlib.contextmanager
def showing_partitions(module: torch.nn.Module) -> Iterator[None]:
    """Allow ``module.state_dict()`` inside the block although its parameters are partitioned."""
    vars(module)[_SHOWN] = True
    try:
        yield
    finally:
        vars(module).pop(_SHOWN, None)


def may_show_partitions(module: torch.nn.Module) -> bool:
    """Tell whether ``module.state_dict()`` is allowed now, inside of ``showing_partitions``."""
    return _SHOWN in vars(module)


def gathers_in_forward(module: torch.nn.Module) -> bool:
    """Tell whether an engine of stage 3 gathers ``module``'s parameters in its forward pass."""
    return "ds_id" in vars(module)  # parameter_offload.py:_register_deepspeed_module


@contextlib.contextmanager
def kept_gathered(module: torch.nn.Module) -> Iterator[None]:
    """Gather all partitioned parameters once, and keep them gathered inside the block.

    DeepSpeed's hooks partition a parameter again after each use, unless another submodule uses it,
    which is pretended here. A collective of all ranks; inside, parameters need none, but
    DeepSpeed's hooks may compare the order of modules, so all ranks must make as many forward
    passes. Changes are discarded.
    """
    split: list[Any] = [p for p in module.parameters() if is_partitioned(p)]
    with gathered(split):
        for parameter in split:
            parameter.ds_active_sub_modules.add(_HELD)
        try:
            yield
        finally:
            for parameter in split:
                parameter.ds_active_sub_modules.discard(_HELD)


_HELD = -1  # no submodule's id
_SHOWN = "_dstrain_shown_in_parts"


def bytes_to_gather(module: torch.nn.Module) -> int:
    """Return the bytes that a rank's device needs at most for all partitioned parameters whole."""
    return sum(full_numel(p) * p.element_size() for p in module.parameters() if is_partitioned(p))
