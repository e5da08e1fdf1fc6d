"""Sizes, partitions and gathering of parameters that ZeRO stage 3 partitions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch

from dstrain.config import ModelFacts
from dstrain.core.errors import ModelError, Problem
from dstrain.engine.zero.scalar_parameters import scalars_as_bytes


def is_partitioned(parameter: Any) -> bool:
    """Tell whether ZeRO stage 3 has divided this parameter among the ranks."""
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Return the shape of the whole parameter; ``shape`` is (0,) while it is partitioned."""
    return tuple(parameter.ds_shape if is_partitioned(parameter) else parameter.shape)


def has_scalars(parameters: Iterable[Any]) -> bool:
    """Tell whether any of the parameters, whole or partitioned, has the shape ()."""
    return any(full_shape(parameter) == () for parameter in parameters)


def rank_partition(parameter: torch.Tensor) -> torch.Tensor | None:
    """Return this rank's partition of a parameter, 1-D and padded, sharing its memory.

    Returns:
        None where the partitions of all ranks, joined in the order of ranks, are not the parameter:
        quantised weights, partitions among some of the ranks, or a partition on a local disk.
    """
    import torch.distributed as dist

    share: Any = parameter.ds_tensor  # type: ignore[attr-defined]
    group = parameter.ds_process_group  # type: ignore[attr-defined]
    whole_world = dist.get_world_size(group=group) == dist.get_world_size()
    if not whole_world or is_on_disk(parameter) or hasattr(share, "ds_quant_scale"):
        return None
    return cast(torch.Tensor, share.detach())


def is_on_disk(parameter: Any) -> bool:
    """Tell whether the rank's partition of a partitioned parameter is offloaded to a local disk.

    Small partitions stay in memory under such offload, and as many more as ``max_in_cpu`` says.
    """
    return getattr(parameter.ds_tensor, "final_location", None) == "nvme"


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
    """Copy changes that a user has made to parameters that stay gathered into their partitions.

    DeepSpeed keeps small parameters gathered between steps, and discards the gathered values when
    it partitions them. The time grows with the number of parameters; no rank waits for another.
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
    """Check that every parameter has a size.

    Raises:
        ModelError: naming the parameters of lazy modules, which have no size yet.
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
    """Return the sizes of a module's parameters, of partitioned ones those of the whole."""
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
        parameters: parameters to gather; ordinary parameters among them are left alone.
        write_from: rank whose changes are kept and sent to all ranks; None discards changes.
        checks: whether DeepSpeed may raise an error where changes are discarded (it does with
            ``enable_sanity_checks``); False where the caller means to discard them.
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

    DeepSpeed's hooks partition a parameter again after a submodule has used it, unless another
    submodule still uses it; here a made-up submodule does. Entering the block is a collective of
    all ranks. Inside, no gathers are needed, but all ranks must run as many forward passes, since
    ``ModuleOrderWatch`` may compare the order of their modules. Changes are discarded.
    """
    split: list[Any] = [p for p in module.parameters() if is_partitioned(p)]
    with gathered(split):
        for parameter in split:
            parameter.ds_active_sub_modules.add(_MADE_UP_SUBMODULE)
        try:
            yield
        finally:
            for parameter in split:
                parameter.ds_active_sub_modules.discard(_MADE_UP_SUBMODULE)


_MADE_UP_SUBMODULE = -1  # the id of the made-up submodule; no real one has it
_SHOWN = "_dstrain_shown_in_parts"


def bytes_to_gather(module: torch.nn.Module) -> int:
    """Return the bytes that a device needs to hold all partitioned parameters gathered."""
    return sum(full_numel(p) * p.element_size() for p in module.parameters() if is_partitioned(p))
