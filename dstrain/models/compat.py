"""The semi-private parts of transformers and its hub that this room uses, in one place."""

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

# Materialise tensors of a checkpoint when they are used: in threads, all of them would be read and
# converted beside each other.
_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"


def described(conversion: Any) -> dict[str, Any]:
    """Return plain values that tell a conversion of transformers from others.

    Its patterns as it uses them: those it was made from are changed when it is reverted.
    """
    return {
        "kind": type(conversion).__name__,
        "sources": list(conversion.source_patterns),
        "targets": list(conversion.target_patterns),
        "scope": conversion.scope_prefix,
        "base": conversion.base_model_prefix,
    }


def given_patterns(conversion: Any) -> dict[str, list[str]]:
    """Return the patterns to make another conversion of, which is reverted to the same one."""
    return {
        "source_patterns": list(conversion._original_source_patterns),
        "target_patterns": list(conversion._original_target_patterns),
    }


def marked_as_used(conversion: Any) -> Any:
    """Mark a conversion as if a checkpoint had been loaded with it, and return it."""
    conversion._was_used = True
    return conversion


def tied_weight_keys(module: Any) -> list[str]:
    """Return patterns of the names that saving leaves out where a weight has several."""
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
    """Tell whether steps are replaced at this moment, by ``with_loading_steps``."""
    from transformers import PreTrainedModel

    return hasattr(PreTrainedModel.from_pretrained, "in_place_of")


@contextlib.contextmanager
def with_loading_steps(steps: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace steps of loading and building models inside, and read tensors one at a time.

    Args:
        steps: name -> what to call in its place, with the original before the arguments. The steps:
            ``from_pretrained`` and ``_from_config`` (which also get the class),
            ``_load_pretrained_model``, ``_finalize_model_loading``, ``set_param_for_module``,
            ``initialize_weights`` and ``_initialize_weights`` (of a module; both also get the
            model).
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
            function = getattr(function, "in_place_of", function)  # a block inside of another
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
    """Keep transformers from printing its table of missing and other weights inside."""
    logger = logging.getLogger("transformers.modeling_utils")

    def hides(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in str(record.msg)

    logger.addFilter(hides)
    try:
        yield
    finally:
        logger.removeFilter(hides)


def _in_place_of(original: Callable[..., Any], step: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return step(original, *args, **kwargs)

    replacement.in_place_of = original  # type: ignore[attr-defined]
    return replacement


@contextlib.contextmanager
def in_context_of_zero(initialize: Callable[..., Any]) -> Iterator[None]:
    """Keep transformers from opening its own DeepSpeed context inside, although stage 3 is on.

    Args:
        initialize: called in the place of each of torch's functions that fill a tensor with first
            values, with the function before its arguments.
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
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
