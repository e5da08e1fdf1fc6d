"""Restoration of functions of torch that DeepSpeed replaces for the whole process."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch

from dstrain.config import ResolvedConfig


class MemoryEfficientLinear:
    """Use of DeepSpeed's linear function, which keeps no gathered weight for the backward pass.

    DeepSpeed replaces ``torch.nn.functional.linear`` by it for all models and the rest of the
    process. This class limits the replacement to partitioned weights, and to the lifetime of an
    engine.
    """

    def __init__(self, resolved: ResolvedConfig) -> None:
        """Replace torch's function, if the stage is 3 and the config does not turn it off."""
        wanted = resolved.values.get("zero_optimization.memory_efficient_linear", True)
        undo_patches()
        present: Any = torch.nn.functional.linear
        self._end: Callable[[], object] = _nothing
        if resolved.stage != 3 or not wanted or _is_deepspeeds(present):
            return
        if not hasattr(present, "num_engines"):
            present = torch.nn.functional.linear = _linear_by_weight(present)
        present.num_engines += 1
        # Runs also when this object is garbage-collected with an engine that was not destroyed.
        self._end = weakref.finalize(self, _release_linear, present)

    def close(self) -> None:
        """Restore torch's function unless another engine needs the replacement.

        Later calls do nothing.
        """
        self._end()


def _nothing() -> None:
    """Do nothing; stands for ``_release_linear`` where nothing was replaced."""


def _release_linear(function: Any) -> None:
    """Count one engine less, and restore torch's function if no engine is left."""
    plain = function.__wrapped__
    function.num_engines -= 1
    if not function.num_engines and torch.nn.functional.linear is function:
        torch.nn.functional.linear = plain


def _linear_by_weight(plain: Any) -> Any:
    """Return a ``torch.nn.functional.linear`` that uses DeepSpeed's for partitioned weights."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    def linear(input: Any, weight: Any, bias: Any = None) -> Any:
        if hasattr(weight, "ds_tensor"):
            return zero3_linear_wrap(input, weight, bias)
        return plain(input, weight, bias)

    function: Any = linear
    function.__wrapped__ = plain
    function.num_engines = 0
    return function


def _is_deepspeeds(function: Any) -> bool:
    """Tell whether a function is DeepSpeed's for quantised weights, which must stay."""
    return str(getattr(function, "__module__", "")).startswith("deepspeed.")


def undo_patches() -> None:
    """Undo the changes that ``zero.Init`` leaves in torch; does nothing inside of its block.

    ``zero.Init`` (``partition_parameters.py:unpatch_init_and_builtins``) leaves its linear
    function, the attributes in which it kept the functions that it replaced, and
    ``Module.__init_subclass__``, which would hide that of another base class of a module. The time
    grows with the number of module classes in the process where there is something to undo.
    """
    partitioning: Any = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if partitioning is None or partitioning.zero_init_context:
        return
    if torch.nn.functional.linear is partitioning.zero3_linear_wrap:
        kept = partitioning.InsertPostInitMethodToModuleSubClasses.linear_bk
        torch.nn.functional.linear = kept
    kinds: Any = torch.nn.Module
    if "_old_init_subclass" not in vars(kinds):
        return
    del kinds._old_init_subclass, kinds._old_apply, kinds.__init_subclass__
    for cls in partitioning.get_all_subclasses(kinds):
        if "_old_init" in vars(cls):
            del cls._old_init
