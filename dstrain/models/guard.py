"""Methods of a model that need its parameters whole: refused while these are partitioned.

A rank has a share of each parameter then, and the parameter itself reads as empty. ``transformers``
and ``peft`` do not notice: they would save empty tensors, and add nothing to them when they merge.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from dstrain.core.adapters import has_adapters
from dstrain.core.errors import ModelError, Problem
from dstrain.engine import full_numel

_SAVE = "call save_model() of the trainer, on all ranks"
_MERGE = "call merge_and_unload() of the trainer, on all ranks, and save_model() after it"
_MERGING = ("merge_and_unload", "merge_adapter", "unmerge_adapter")


def guard_partitioned(model: Any) -> None:
    """Let the model's own saving and merging raise as long as parameters are partitioned."""
    guarded = {"save_pretrained": (model, _SAVE)}
    if has_adapters(model):
        guarded |= {name: (model.base_model, _MERGE) for name in _MERGING}
    for name, (owner, remedy) in guarded.items():
        if hasattr(type(owner), name):
            setattr(owner, name, functools.partial(_with_whole, owner, name, remedy))


def _with_whole(owner: torch.nn.Module, name: str, remedy: str, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("state_dict") is None and _is_in_parts(owner):
        raise ModelError(
            Problem(
                f"{name}() of a model that is partitioned over the ranks (ZeRO stage 3)",
                "this rank has a share of each weight, and the weights themselves read as empty",
                remedy,
            )
        )
    method: Callable[..., Any] = getattr(type(owner), name)
    return method(owner, *args, **kwargs)


def _is_in_parts(module: torch.nn.Module) -> bool:
    """Whether a parameter is partitioned, and not gathered at this moment."""
    return any(p.numel() != full_numel(p) for p in module.parameters())
