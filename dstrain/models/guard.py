"""Methods of a model that need its parameters whole: refused while these are partitioned.

A rank has a share of each parameter then, and the parameter itself reads as empty. ``transformers``
and ``peft`` do not notice: they would save empty tensors, add nothing to them when they merge, and
resize what no engine knows of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from dstrain.core.adapters import has_adapters
from dstrain.core.errors import ModelError, Problem
from dstrain.engine import Partitioner, full_numel, is_partitioned
from dstrain.models.resize import resize_partitioned

_SAVE = "call save_model() of the trainer, on all ranks"
_MERGE = "call merge_and_unload() of the trainer, on all ranks, and save_model() after it"
_RESIZE = (
    "call it on all ranks inside `with dstrain.partitioned(args):`, right after the model is built "
    "or loaded there"
)
_MERGING = ("merge_and_unload", "merge_adapter", "unmerge_adapter")


def guard_partitioned(
    model: Any, open_partitioner: Callable[[], Partitioner | None] = lambda: None
) -> None:
    """Let the model's own saving, merging and resizing raise while parameters are partitioned.

    Args:
        model: to be guarded.
        open_partitioner: what takes resized weights apart, as long as resizing is allowed: inside
            of the ``partitioned(args)`` in which the model was made.
    """
    refuse: Callable[..., Any] = functools.partial(_refused_in_parts, remedy=_SAVE)
    resize: Callable[..., Any] = functools.partial(_resized, open_partitioner=open_partitioner)
    guarded: dict[str, tuple[Any, Callable[..., Any]]] = {
        "save_pretrained": (model, refuse),
        "resize_token_embeddings": (model, resize),
    }
    if has_adapters(model):
        refuse = functools.partial(_refused_in_parts, remedy=_MERGE)
        guarded |= {name: (model.base_model, refuse) for name in _MERGING}
    for name, (owner, act) in guarded.items():
        if hasattr(type(owner), name):
            setattr(owner, name, functools.partial(act, owner, name))


def _refused_in_parts(
    owner: torch.nn.Module, name: str, *args: Any, remedy: str, **kwargs: Any
) -> Any:
    if kwargs.get("state_dict") is None and _is_in_parts(owner):
        raise _refusal(
            name,
            "this rank has a share of each weight, and the weights themselves read as empty",
            remedy,
        )
    return _own(owner, name)(owner, *args, **kwargs)


def _resized(
    owner: torch.nn.Module,
    name: str,
    *args: Any,
    open_partitioner: Callable[[], Partitioner | None],
    **kwargs: Any,
) -> Any:
    if not any(is_partitioned(p) for p in owner.parameters()):
        return _own(owner, name)(owner, *args, **kwargs)
    partitioner = open_partitioner()
    if partitioner is None:
        raise _refusal(
            name, "it makes new weights of whole ones, and this rank has a share of each", _RESIZE
        )
    return resize_partitioned(owner, _own(owner, name), *args, partitioner=partitioner, **kwargs)


def _refusal(name: str, why: str, remedy: str) -> ModelError:
    what = f"{name}() of a model that is partitioned over the ranks (ZeRO stage 3)"
    return ModelError(Problem(what, why, remedy))


def _own(owner: torch.nn.Module, name: str) -> Callable[..., Any]:
    method: Callable[..., Any] = getattr(type(owner), name)
    return method


def _is_in_parts(module: torch.nn.Module) -> bool:
    """Whether a parameter is partitioned, and not gathered at this moment."""
    return any(p.numel() != full_numel(p) for p in module.parameters())
