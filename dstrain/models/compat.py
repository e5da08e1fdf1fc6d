"""Access to private parts of transformers, for all of ``dstrain.models``."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
)

__all__ = [
    "PrefixChange",
    "WeightConverter",
    "WeightRenaming",
    "apply_converters",
    "apply_renamings",
    "described",
    "dot_natural_key",
    "get_model_conversion_mapping",
    "given_patterns",
    "in_context_of_zero",
    "marked_as_used",
    "tied_weight_keys",
    "with_loading_steps",
    "without_load_report",
]

# Environment variable that makes transformers read each tensor of a checkpoint only when it is
# used. With its threads, many tensors would be in memory at the same time.
_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"


def described(conversion: Any) -> dict[str, Any]:
    """Return plain values that identify a conversion of transformers.

    They contain the patterns that it uses, which may differ from those it was made from.
    """
    return {
        "kind": type(conversion).__name__,
        "sources": list(conversion.source_patterns),
        "targets": list(conversion.target_patterns),
        "scope": conversion.scope_prefix,
        "base": conversion.base_model_prefix,
    }


def given_patterns(conversion: Any) -> dict[str, list[str]]:
    """Return the patterns from which a conversion was made, as arguments for another like it."""
    return {
        "source_patterns": list(conversion._original_source_patterns),
        "target_patterns": list(conversion._original_target_patterns),
    }


def marked_as_used(conversion: Any) -> Any:
    """Mark a conversion as used in loading a checkpoint, and return it."""
    conversion._was_used = True
    return conversion


def tied_weight_keys(module: Any) -> list[str]:
    """Return patterns of the names that saving leaves out if a weight has several names."""
    from transformers import modeling_utils

    keys: list[str] = modeling_utils._get_tied_weight_keys(module)
    return keys


LOADING_STEPS = (
    "from_pretrained",
    "_from_config",
    "_load_pretrained_model",
    "_finalize_model_loading",
    "set_param_for_module",
    "initialize_weights",
    "_initialize_weights",
)


def has_loading_steps() -> bool:
    """Tell whether ``with_loading_steps`` has replaced steps at this moment."""
    from transformers import PreTrainedModel

    return hasattr(PreTrainedModel.from_pretrained, "in_place_of")


@contextlib.contextmanager
def with_loading_steps(steps: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace steps of loading and building models inside the block; read tensors one at a time.

    Args:
        steps: name of a step -> function to call instead, whose first argument is the original
            step. The steps are ``from_pretrained`` and ``_from_config`` (with the class as second
            argument), ``initialize_weights`` and ``_initialize_weights`` (with the model as second
            argument), ``_load_pretrained_model``, ``_finalize_model_loading`` and
            ``set_param_for_module``. If empty, nothing is changed.
    """
    from transformers import PreTrainedModel

    kinds: dict[str, Any] = {
        "from_pretrained": classmethod,
        "_from_config": classmethod,
        "initialize_weights": lambda function: function,
        "_initialize_weights": lambda function: function,
    }
    with contextlib.ExitStack() as replaced:
        for name, step in steps.items():
            owner: Any = PreTrainedModel
            wrap: Any = kinds.get(name, staticmethod)
            if name == "set_param_for_module":
                owner, wrap = core_model_loading, lambda function: function
            before = vars(owner)[name]
            function = getattr(before, "__func__", before)
            # The original step, if this block is inside of another one.
            function = getattr(function, "in_place_of", function)
            setattr(owner, name, wrap(_in_place_of(function, step)))
            replaced.callback(setattr, owner, name, before)
        if not steps:
            yield
            return
        environment = os.environ.get(_ONE_BY_ONE)
        os.environ[_ONE_BY_ONE] = "1"
        replaced.callback(_set_environment, _ONE_BY_ONE, environment)
        yield


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """Keep transformers from logging its table of missing and unused weights in the block."""
    logger = logging.getLogger("transformers.modeling_utils")

    def hides(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in str(record.msg)

    logger.addFilter(hides)
    try:
        yield
    finally:
        logger.removeFilter(hides)


def _in_place_of(original: Callable[..., Any], step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ``step`` with the original step as its first argument."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        return step(original, *args, **kwargs)

    replacement.in_place_of = original  # type: ignore[attr-defined]
    return replacement


@contextlib.contextmanager
def in_context_of_zero(initialize: Callable[..., Any]) -> Iterator[None]:
    """Keep transformers from opening its own ``zero.Init`` context inside, although stage 3 is on.

    Args:
        initialize: called instead of each of torch's functions for initialisation, with the
            function as first argument.
    """
    from transformers import initialization, modeling_utils

    functions: dict[str, Any] = initialization.TORCH_INIT_FUNCTIONS
    before = dict(functions)
    try:
        for name, function in before.items():
            functions[name] = functools.partial(initialize, function)
        with initialization.guard_torch_init_functions(), modeling_utils.set_zero3_state():
            yield
    finally:
        functions.update(before)


def _set_environment(name: str, value: str | None) -> None:
    """Set an environment variable, or remove it (None)."""
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
