"""Actions that a partitioned model cannot do by itself: refused, or done on all ranks together.

A rank has a share of each parameter then, and the parameter itself reads as empty. Neither torch
nor ``transformers`` nor ``peft`` notices: they would save and copy empty tensors, add nothing to
them when they merge, resize what no engine knows of, and compute with them unless an engine puts
them together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from dstrain.core.adapters import has_adapters
from dstrain.core.errors import ModelError, Problem
from dstrain.core.log import get_logger
from dstrain.engine import (
    Partitioner,
    StageRegistration,
    full_numel,
    gathers_in_forward,
    generating_together,
    is_partitioned,
    may_show_partitions,
)
from dstrain.models.resize import resize_partitioned

logger = get_logger(__name__)

_WHOLE = "trainer.close(whole=True), on all ranks, makes it an ordinary model again"
_SAVE = "call save_model() of the trainer, on all ranks"
_MERGE = "call merge_and_unload() of the trainer, on all ranks, and save_model() after it"
_RUN = f"call evaluate(), predict() or train() of the trainer; {_WHOLE}"
_RESIZE = (
    "call it on all ranks inside `with dstrain.partitioned(args):`, right after the model is built "
    "or loaded there"
)
_MERGING = ("merge_and_unload", "merge_adapter", "unmerge_adapter")
_UNDO = "_dstrain_guard"
_PATIENCE_SECONDS = 1800.0  # as ddp_timeout, where there are no arguments yet


def guard_partitioned(
    model: Any,
    *,
    patience_seconds: float = _PATIENCE_SECONDS,
    open_partitioner: Callable[[], Partitioner | None] = lambda: None,
) -> None:
    """Guard a model as long as its parameters are partitioned; nothing for a whole one.

    Args:
        model: may be guarded already: then this guard takes the place of that one.
        patience_seconds: how long a rank that generates waits for the others.
        open_partitioner: returns what takes resized weights apart, as long as resizing is allowed:
            inside of the ``partitioned(args)`` in which the model was made.
    """
    if not any(is_partitioned(p) for p in model.parameters()):
        return
    release_guard(model)
    undo: list[Callable[[], object]] = []

    def replace(owner: Any, name: str, by: Callable[..., Any], *arguments: Any) -> None:
        if hasattr(type(owner), name):
            undo.append(_replace(owner, name, by, *arguments))

    replace(model, "save_pretrained", _if_whole, "save_pretrained()", _SAVE)
    replace(model, "resize_token_embeddings", _resize, open_partitioner)
    if has_adapters(model):
        for name in _MERGING:
            replace(model.base_model, name, _if_whole, f"{name}()", _MERGE)
        # It reads gradients, which DeepSpeed gathers, where transformers knows of stage 3.
        replace(model.base_model, "update_and_allocate", _as_at_stage_3)
    for generator in _generators(model):
        replace(generator, "generate", _on_all_ranks, patience_seconds)
    replace(model, "__reduce_ex__", _refuse_copy)
    undo.append(model.register_forward_pre_hook(_needs_engine).remove)
    undo.append(model.register_state_dict_pre_hook(_needs_whole_state).remove)
    vars(model)[_UNDO] = undo


def release_guard(model: Any) -> None:
    """Remove the guard of a model that is whole again."""
    for step in vars(model).pop(_UNDO, ()):
        step()


def _replace(owner: Any, name: str, by: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
    """Let calls of a method go through ``by``, and return a function that undoes it."""
    attributes = vars(owner)
    had, method = name in attributes, getattr(owner, name)
    through = functools.partial(by, owner, method, *arguments)
    setattr(owner, name, through)

    def undo() -> None:
        if attributes.get(name) is not through:
            return  # replaced since
        if had:
            attributes[name] = method
        else:
            del attributes[name]

    return undo


def _generators(model: torch.nn.Module) -> list[Any]:
    from transformers import GenerationMixin

    return [module for module in model.modules() if isinstance(module, GenerationMixin)]


# --- what goes through ----------------------------------------------------------------------------


def _if_whole(
    owner: Any, method: Callable[..., Any], what: str, remedy: str, *args: Any, **kwargs: Any
) -> Any:
    if kwargs.get("state_dict") is None and _is_in_parts(owner):
        raise _in_parts(what, remedy)
    return method(*args, **kwargs)


def _resize(
    owner: Any,
    method: Callable[..., Any],
    open_partitioner: Callable[[], Partitioner | None],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not any(is_partitioned(p) for p in owner.parameters()):
        return method(*args, **kwargs)
    partitioner = open_partitioner()
    if partitioner is None:
        raise _in_parts("resize_token_embeddings()", f"{_RESIZE}; {_WHOLE}")

    def resize(_: Any, *args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return resize_partitioned(owner, resize, *args, partitioner=partitioner, **kwargs)


def _refuse_copy(owner: Any, method: Callable[..., Any], *args: Any) -> Any:
    raise _in_parts("a copy, or torch.save(),", f"{_SAVE}; {_WHOLE}")


def _as_at_stage_3(owner: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with StageRegistration(3):
        return method(*args, **kwargs)


def _on_all_ranks(
    owner: Any, method: Callable[..., Any], patience: float, *args: Any, **kwargs: Any
) -> Any:
    """Generate in step: a rank that is done early goes on with the others."""
    if not gathers_in_forward(owner):
        if _is_in_parts(owner):
            raise _in_parts("generate()", _RUN)
        return method(*args, **kwargs)
    if kwargs.get("synced_gpus") is False:
        logger.info("generate(synced_gpus=False): ranks keep in step all the same, as they must")
        kwargs["synced_gpus"] = None
    with generating_together("generate()", patience_seconds=patience):
        return method(*args, **kwargs)


def _needs_engine(module: torch.nn.Module, *_: object) -> None:
    if not gathers_in_forward(module) and _is_in_parts(module):
        raise _in_parts("a forward pass", _RUN)


def _needs_whole_state(module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
    """Refuse a ``state_dict`` of empty tensors; with ``keep_vars`` parameters may be had."""
    if not keep_vars and not may_show_partitions(module) and _is_in_parts(module):
        raise _in_parts("state_dict()", f"{_SAVE}; {_WHOLE}")


def _in_parts(what: str, remedy: str) -> ModelError:
    return ModelError(
        Problem(
            f"{what} of a model that is partitioned over the ranks (ZeRO stage 3)",
            "this rank has a share of each weight, and the weights themselves read as empty",
            remedy,
        )
    )


def _is_in_parts(module: torch.nn.Module) -> bool:
    """Tell whether a parameter is partitioned, and not gathered at this moment."""
    return any(p.numel() != full_numel(p) for p in module.parameters())
