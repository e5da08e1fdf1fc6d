"""Protection of partitioned models against methods that would find empty parameters.

Each rank has only a partition of every parameter, and the parameter itself is an empty tensor.
Neither torch nor ``transformers`` nor ``peft`` checks for that: they would save, copy, merge and
resize empty tensors, and compute with them where no engine gathers the parameters. Such methods
either raise an error here, or run on all ranks together.
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
_PATIENCE_SECONDS = 1800.0  # default of ddp_timeout, for models without arguments of a run


def guard_partitioned(
    model: Any,
    *,
    patience_seconds: float = _PATIENCE_SECONDS,
    open_partitioner: Callable[[], Partitioner | None] = lambda: None,
) -> None:
    """Replace methods of a partitioned model, until ``release_guard``; a whole one stays as it is.

    Args:
        model: the model; a guard that it has already is replaced.
        patience_seconds: how long ``generate`` waits for all ranks to call it.
        open_partitioner: returns the partitioner for resized weights, or None where resizing is not
            allowed; it is allowed inside the ``partitioned(args)`` block that made the model.
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
        # AdaLoRA's method reads gradients by DeepSpeed's functions if stage 3 is registered.
        replace(model.base_model, "update_and_allocate", _as_at_stage_3)
    for generator in _generators(model):
        replace(generator, "generate", _on_all_ranks, patience_seconds)
    replace(model, "__reduce_ex__", _refuse_copy)
    undo.append(model.register_forward_pre_hook(_needs_engine).remove)
    undo.append(model.register_state_dict_pre_hook(_needs_whole_state).remove)
    vars(model)[_UNDO] = undo


def release_guard(model: Any) -> None:
    """Restore the methods that ``guard_partitioned`` has replaced."""
    for step in vars(model).pop(_UNDO, ()):
        step()


def _replace(owner: Any, name: str, by: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
    """Replace a method of an object.

    Args:
        owner: the object.
        name: name of the method.
        by: called instead, with owner, original method, ``arguments`` and those of the call.
        *arguments: arguments of ``by``.

    Returns:
        a function that restores the method.
    """
    attributes = vars(owner)
    had, method = name in attributes, getattr(owner, name)
    through = functools.partial(by, owner, method, *arguments)
    setattr(owner, name, through)

    def undo() -> None:
        if attributes.get(name) is not through:
            return  # other code has replaced it since
        if had:
            attributes[name] = method
        else:
            del attributes[name]

    return undo


def _generators(model: torch.nn.Module) -> list[Any]:
    """Return the modules that have transformers' ``generate``."""
    from transformers import GenerationMixin

    return [module for module in model.modules() if isinstance(module, GenerationMixin)]


# --- replacements of methods ----------------------------------------------------------------------


def _if_whole(
    owner: Any, method: Callable[..., Any], what: str, remedy: str, *args: Any, **kwargs: Any
) -> Any:
    """Call the method if all parameters are whole, or if the caller passes a ``state_dict``.

    Raises:
        ModelError: a parameter is partitioned.
    """
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
    """Resize the embeddings of a partitioned model; a collective of all ranks.

    Raises:
        ModelError: resizing is not allowed any more.
    """
    if not any(is_partitioned(p) for p in owner.parameters()):
        return method(*args, **kwargs)
    partitioner = open_partitioner()
    if partitioner is None:
        raise _in_parts("resize_token_embeddings()", f"{_RESIZE}; {_WHOLE}")

    def resize(_: Any, *args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return resize_partitioned(owner, resize, *args, partitioner=partitioner, **kwargs)


def _refuse_copy(owner: Any, method: Callable[..., Any], *args: Any) -> Any:
    """Raise an error; stands for ``__reduce_ex__``, which copying and pickling call."""
    raise _in_parts("a copy, or torch.save(),", f"{_SAVE}; {_WHOLE}")


def _as_at_stage_3(owner: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the method while stage 3 is registered with transformers."""
    with StageRegistration(3):
        return method(*args, **kwargs)


def _on_all_ranks(
    owner: Any, method: Callable[..., Any], patience: float, *args: Any, **kwargs: Any
) -> Any:
    """Generate on all ranks together; a rank that finishes early continues until all have.

    Raises:
        ModelError: parameters are partitioned and no engine gathers them, or another rank does not
            call it in time.
    """
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
    """Check, before a forward pass, that an engine gathers partitioned parameters."""
    if not gathers_in_forward(module) and _is_in_parts(module):
        raise _in_parts("a forward pass", _RUN)


def _needs_whole_state(module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
    """Check that ``state_dict`` would not return empty tensors.

    With ``keep_vars`` it returns the parameters themselves, which is allowed.
    """
    if not keep_vars and not may_show_partitions(module) and _is_in_parts(module):
        raise _in_parts("state_dict()", f"{_SAVE}; {_WHOLE}")


def _in_parts(what: str, remedy: str) -> ModelError:
    """Return the error for something that a partitioned model cannot do."""
    return ModelError(
        Problem(
            f"{what} of a model that is partitioned over the ranks (ZeRO stage 3)",
            "this rank has a share of each weight, and the weights themselves read as empty",
            remedy,
        )
    )


def _is_in_parts(module: torch.nn.Module) -> bool:
    """Tell whether any parameter is partitioned and not gathered at this moment."""
    return any(p.numel() != full_numel(p) for p in module.parameters())
