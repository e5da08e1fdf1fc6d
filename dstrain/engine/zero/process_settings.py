"""Setting and resetting of engine settings that DeepSpeed keeps in variables of the process.

Otherwise an engine would use the settings of another engine of the process.
"""

from __future__ import annotations

from typing import Any

import torch

from dstrain.config import ResolvedConfig


def set_for(module: torch.nn.Module, resolved: ResolvedConfig) -> None:
    """Set process-wide settings to those of ``module``, before an engine on it is built.

    Otherwise the new engine would use another engine's hpZ groups (``stage3.py:__init__``), and
    another engine's autocast formats instead of its ``communication_data_type``.
    """
    from deepspeed.runtime import torch_autocast
    from deepspeed.utils import groups

    parameter = next(module.parameters(), None)
    group = getattr(parameter, "ds_zero_param_process_group", None)
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = group if _has_groups(resolved) else None
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    torch_autocast.TORCH_AUTOCAST_DTYPE = None


def keep_communication_format(optimizer: Any, resolved: ResolvedConfig) -> None:
    """Fix the format in which an engine's optimizer communicates.

    Otherwise it would ask at each gradient whether any engine of the process, also one built later,
    uses autocast (``base_optimizer.py``).
    """
    if not hasattr(optimizer, "communication_data_type"):
        return  # BF16_Optimizer does not ask
    from deepspeed.runtime.torch_autocast import get_comm_dtype

    common = optimizer.communication_data_type
    autocasts = resolved.autocasts
    optimizer.get_param_comm_dtype = get_comm_dtype if autocasts else lambda parameter: common


def reset(resolved: ResolvedConfig, *, others: bool) -> None:
    """Undo the settings of an engine that was destroyed.

    Args:
        resolved: config of the engine.
        others: whether there are other engines, for which the settings of activation checkpointing
            must stay.
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

        deepspeed.checkpointing.configure(None)  # sets the defaults


def _has_groups(resolved: ResolvedConfig) -> bool:
    """Tell whether hpZ partitions parameters among groups of ranks."""
    return resolved.hpz_partition_size > 1
