"""Parameter groups with and without weight decay, by the rule of transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dstrain.core.errors import ModelError, Problem

# Patterns of parameter names to which transformers' Trainer applies no weight decay.
_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def decay_parameter_names(module: torch.nn.Module) -> list[str]:
    """Return the names of parameters with weight decay, by the rule of transformers' Trainer."""
    from dstrain.engine.compat import get_parameter_names

    return get_parameter_names(module, [torch.nn.LayerNorm], _NO_DECAY)


def parameter_groups(
    module: torch.nn.Module,
    *,
    weight_decay: float,
    decay_names: Callable[[torch.nn.Module], list[str]] = decay_parameter_names,
) -> list[dict[str, Any]]:
    """Return a group with ``weight_decay`` and one without; empty groups are left out.

    Raises:
        ModelError: no parameter of the module has requires_grad.
    """
    # There are two groups even if weight_decay is 0, as in transformers, since scripts set
    # different learning rates for them.
    decayed = set(decay_names(module))
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[0 if name in decayed else 1]["params"].append(parameter)
    groups = [g for g in groups if g["params"]]
    if not groups:
        raise ModelError(
            Problem(
                f"{type(module).__name__} has no trainable parameter",
                "every parameter has requires_grad=False",
                "unfreeze some, or call evaluate() instead of train()",
            )
        )
    return groups


def group_of(engine_optimizer: Any, parameter: torch.nn.Parameter) -> dict[str, Any] | None:
    """Return the parameter group of a parameter; None for a frozen one.

    At ZeRO stages 1 to 3 the optimizer's groups contain flat tensors, so the parameter is searched
    in DeepSpeed's own lists of parameters by group.
    """
    groups: list[dict[str, Any]] = engine_optimizer.param_groups
    lists = getattr(engine_optimizer, "bit16_groups", None)  # stages 1 and 2
    index = None
    if lists is None:
        lists = getattr(engine_optimizer, "fp16_groups", None)  # stage 3, stage 0 in 16 bits
        index = getattr(engine_optimizer, "sub_group_to_group_id", None)
    if lists is None:
        lists = getattr(engine_optimizer, "bf16_groups", None)
    if lists is None:
        lists = [group["params"] for group in groups]
    for i, parameters in enumerate(lists):
        if any(p is parameter for p in parameters):
            return groups[i if index is None else index[i]]
    return None
