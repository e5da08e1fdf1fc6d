"""Settings that DeepSpeed keeps once per process, although each engine has its own.

Left alone, an engine would work by those of another one that lives beside it or lived before.
"""

from __future__ import annotations

from typing import Any

import torch

from dstrain.config import ResolvedConfig


def set_for(module: torch.nn.Module, resolved: ResolvedConfig) -> None:
    """Reset process-wide settings to those of ``module``, before an engine on it is built.

    An engine takes over the groups of hpZ, whatever its own size is (``stage3.py:__init__``), and
    the formats of autocast instead of its ``communication_data_type``.
    """
    from deepspeed.runtime import torch_autocast
    from deepspeed.utils import groups

    parameter = next(module.parameters(), None)
    group = getattr(parameter, "ds_zero_param_process_group", None)
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = group if _has_groups(resolved) else None
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    torch_autocast.TORCH_AUTOCAST_DTYPE = None


def keep_communication_format(optimizer: Any, resolved: ResolvedConfig) -> None:
    """Let an engine's optimizer communicate in its own formats, whatever is built later.

    It would ask at each gradient whether any engine autocasts (``base_optimizer.py``).
    """
    if not hasattr(optimizer, "communication_data_type"):
        return  # as BF16_Optimizer, which does not ask
    from deepspeed.runtime.torch_autocast import get_comm_dtype

    common = optimizer.communication_data_type
    autocasts = resolved.autocasts
    optimizer.get_param_comm_dtype = get_comm_dtype if autocasts else lambda parameter: common


def reset(resolved: ResolvedConfig, *, others: bool) -> None:
    """Undo the settings of an engine that is gone.

    Args:
        resolved: its config.
        others: whether there are other engines, whose settings of activation checkpointing stay.
    """
    if _has_groups(resolved):
        from deepspeed.utils import groups

        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    if resolved.autocasts:
        from deepspeed.runtime import torch_autocast

        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
        torch_autocast.TORCH_AUTOCAST_DTYPE = None
    if not others and any(key.startswith("activation_checkpointing.") for key in resolved.values):
        import deepspeed

        deepspeed.checkpointing.configure(None)  # all at their defaults


def _has_groups(resolved: ResolvedConfig) -> bool:
    return resolved.hpz_partition_size > 1
