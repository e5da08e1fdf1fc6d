"""Telling transformers and torch that models are partitioned, and undoing it."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch

from dstrain.config import ResolvedConfig
from dstrain.engine import compat


class StageRegistration:
    """A DeepSpeed config that transformers is told of, from its construction to ``close``.

    At stage 3 transformers builds models partitioned, generates in step on all ranks, and runs on
    each rank the layers that chance would skip there. It keeps only a weak reference, so this
    object must be held meanwhile. It has the things that transformers reads; transformers' own
    class for them needs accelerate.
    """

    def __init__(self, stage: int, config: Callable[[], dict[str, Any]] = dict) -> None:
        """Register when the stage is 3, unregister otherwise.

        Args:
            stage: of ZeRO.
            config: makes the DeepSpeed config; needed where models are built.
        """
        self._stage, self._make_config = stage, config
        self._previous = compat.registered_config()
        compat.register_config(self if stage == 3 else None)

    @property
    def config(self) -> dict[str, Any]:
        """Return the DeepSpeed config that partitioned models are built by."""
        return self._make_config()

    def is_zero3(self) -> bool:
        """Tell whether the stage is 3: transformers asks where it builds models and generates."""
        return self._stage == 3

    def is_zero2(self) -> bool:
        """Tell whether the stage is 2: transformers asks in few places."""
        return self._stage == 2

    def close(self) -> None:
        """Restore what was registered before, unless a user has registered a config since."""
        present = compat.registered_config()
        # One inside of this one, which an interrupt kept from closing, ends with it.
        if present is None or isinstance(present, StageRegistration):
            compat.register_config(self._previous)
        self._previous = None

    def __enter__(self) -> StageRegistration:
        """Return itself, which is registered already."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()


class BuildRegistration(StageRegistration):
    """A registration for transformers to build models by a resolved config; close it afterwards."""

    def __init__(self, resolved: ResolvedConfig) -> None:
        """Register with transformers when the stage is 3, unregister otherwise."""
        super().__init__(resolved.stage, resolved.to_deepspeed)

    def close(self) -> None:
        """Restore what was registered before, and undo what DeepSpeed leaves changed in torch."""
        super().close()
        undo_patches()


class ForwardRegistration:
    """Hooks that register with transformers during every forward pass of a partitioned module.

    LayerDrop (Wav2Vec2 and its kind) must run a layer on all ranks or on none, and AdaLoRA gathers
    parameters for its regularisation; both ask transformers. No model is built in there.
    """

    def __init__(self, module: torch.nn.Module, resolved: ResolvedConfig) -> None:
        """Hook ``module``: a model, or the engine around it."""
        self._resolved = resolved
        self._told: list[StageRegistration] = []
        self._hooks = (
            module.register_forward_pre_hook(self._begin, prepend=True),
            module.register_forward_hook(self._end, always_call=True),
        )

    def remove(self) -> None:
        """Remove the hooks, and end what an interrupt kept from ending."""
        for hook in self._hooks:
            hook.remove()
        while self._told:
            self._end()

    def _begin(self, *_: object) -> None:
        self._told.append(StageRegistration(3, self._resolved.to_deepspeed))

    def _end(self, *_: object) -> None:
        if self._told:
            self._told.pop().close()


# --- torch.nn.functional.linear ------------------------------------------------------------------


class MemoryEfficientLinear:
    """Linear layers with partitioned weights that keep no gathered weight for the backward pass.

    DeepSpeed puts a function of its own in the place of ``torch.nn.functional.linear``, for all
    models and the rest of the process. Here it is used as long as an engine lives, and only where a
    weight is partitioned.
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
        # Also when an engine is collected that nobody has destroyed.
        self._end = weakref.finalize(self, _release_linear, present)

    def close(self) -> None:
        """Restore torch's function once no engine needs the replacement; again does nothing."""
        self._end()


def _nothing() -> None:
    """Do nothing at the end."""


def _release_linear(function: Any) -> None:
    """Count one engine less that needs the replacement; the last one restores torch's function."""
    plain = function.__wrapped__
    function.num_engines -= 1
    if not function.num_engines and torch.nn.functional.linear is function:
        torch.nn.functional.linear = plain


def _linear_by_weight(plain: Any) -> Any:
    """Return a ``torch.nn.functional.linear`` that takes DeepSpeed's for partitioned weights."""
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


# --- what zero.Init leaves ------------------------------------------------------------------------


def undo_patches() -> None:
    """Undo what zero.Init leaves in torch after its block; nothing while such a block is open.

    Beside ``linear`` these are names under which it keeps what it replaces for a while, and
    ``Module.__init_subclass__``, which would hide that of a class beside Module in a list of bases
    (``partition_parameters.py:unpatch_init_and_builtins``). After a block the time grows with the
    number of module classes in the process.
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
