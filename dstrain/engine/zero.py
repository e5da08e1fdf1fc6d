"""Partitioned parameters of ZeRO-3: their true sizes, gathering them, building models of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch

from dstrain.config import ModelFacts, ResolvedConfig
from dstrain.engine.scalars import scalars_as_bytes


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO-3 holds this parameter as one slice per rank."""
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of the whole parameter; a partitioned one reports (0,) itself."""
    return tuple(parameter.ds_shape if is_partitioned(parameter) else parameter.shape)


def has_scalars(parameters: Iterable[Any]) -> bool:
    """Whether a parameter, whole or partitioned, has the shape ()."""
    return any(full_shape(parameter) == () for parameter in parameters)


def own_partition(parameter: torch.Tensor) -> torch.Tensor | None:
    """This rank's share of a partitioned parameter as it is trained, 1-D and padded.

    Returns:
        None where the shares of all ranks, one after another, are not the parameter: quantised
        weights, a group of some of the ranks, or a share that is not in memory.
    """
    import torch.distributed as dist

    share: Any = parameter.ds_tensor  # type: ignore[attr-defined]
    group = parameter.ds_process_group  # type: ignore[attr-defined]
    whole_world = dist.get_world_size(group=group) == dist.get_world_size()
    there = share.numel() * dist.get_world_size() >= full_numel(parameter)
    if not whole_world or not there or hasattr(share, "ds_quant_scale"):
        return None
    return cast(torch.Tensor, share.detach())


def full_numel(parameter: Any) -> int:
    """Elements of the whole parameter."""
    return int(parameter.ds_numel if is_partitioned(parameter) else parameter.numel())


def model_facts(module: torch.nn.Module) -> ModelFacts:
    """Sizes of a module's parameters, right for partitioned ones too."""
    return ModelFacts.of_shapes((full_shape(p), p.requires_grad) for p in module.parameters())


@contextlib.contextmanager
def gathered(
    parameters: Iterable[torch.nn.Parameter], *, write_from: int | None = None
) -> Iterator[None]:
    """Make whole parameters of partitioned ones inside the block; a collective of all ranks.

    Args:
        parameters: the ones to gather; those that are not partitioned are left alone.
        write_from: rank whose changes are kept and sent to the others; None discards changes.
    """
    split = [p for p in parameters if is_partitioned(p)]
    if not split:
        yield
        return
    import deepspeed

    whole = deepspeed.zero.GatheredParameters(split, modifier_rank=write_from)
    sends_scalars = write_from is not None and has_scalars(split)

    def leave(*error: Any) -> Any:
        with scalars_as_bytes(wanted=sends_scalars):
            return whole.__exit__(*error)

    with contextlib.ExitStack() as stack:
        whole.__enter__()
        stack.push(leave)
        yield


def forget_process_wide_settings(module: torch.nn.Module, resolved: ResolvedConfig) -> None:
    """Undo what DeepSpeed keeps in its modules beyond the life of an engine.

    Left alone, the next engine of this process would take over the groups of hpZ, whatever its own
    size is (``stage3.py:__init__``), and the formats of autocast instead of its
    ``communication_data_type`` (``stage_1_and_2.py:__init__``).
    """
    if int(resolved.values.get("zero_optimization.zero_hpz_partition_size", 1)) > 1:
        from deepspeed.utils import groups

        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    if resolved.values.get("torch_autocast.enabled"):
        from deepspeed.runtime import torch_autocast

        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
        torch_autocast.TORCH_AUTOCAST_DTYPE = None
        for parameter in module.parameters():
            parameter.__dict__.pop(torch_autocast.PARAM_COMM_DTYPE_ATTR_NAME, None)
    if any(key.startswith("activation_checkpointing.") for key in resolved.values):
        import deepspeed

        deepspeed.checkpointing.configure(None)  # all at their defaults


class ZeroThreeMark:
    """Tells transformers that ZeRO stage 3 is on: models are then built partitioned.

    transformers keeps only a weak reference, so this object must live as long as that should hold:
    while the model is built, and while it generates (ranks must then stay in step). It has the two
    things that transformers reads, ``config`` and ``is_zero3``; its own class needs accelerate.
    """

    def __init__(self, resolved: ResolvedConfig) -> None:
        """Register with transformers when the stage is 3, unregister otherwise."""
        from dstrain.engine import compat

        self.config: dict[str, Any] = resolved.to_deepspeed()
        self._stage = resolved.stage
        self._previous = compat.registered_config()
        compat.register_config(self if self._stage == 3 else None)

    def is_zero3(self) -> bool:
        """Asked by transformers when it builds a model."""
        return self._stage == 3

    def is_zero2(self) -> bool:
        """Asked by transformers in few places."""
        return self._stage == 2

    def close(self) -> None:
        """Put back what was registered before, unless somebody has registered since."""
        from dstrain.engine import compat

        if compat.registered_config() is (self if self._stage == 3 else None):
            compat.register_config(self._previous)
        self._previous = None


@contextlib.contextmanager
def kept_whole(module: torch.nn.Module) -> Iterator[None]:
    """Gather all partitioned parameters once, and keep them through forward passes inside.

    DeepSpeed's hooks partition a parameter again after each use, unless another submodule is said
    to be using it. A collective of all ranks; inside, parameters need none, but DeepSpeed's hooks
    may compare the order of modules, so ranks must make as many forward passes. Changes are
    discarded.
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


def bytes_to_gather(module: torch.nn.Module) -> int:
    """What ``kept_whole`` adds to the device of a rank at most."""
    return sum(full_numel(p) * p.element_size() for p in module.parameters() if is_partitioned(p))
