"""Registering with transformers that models are partitioned, and undoing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dstrain.config import ResolvedConfig
from dstrain.engine import compat
from dstrain.engine.zero.torch_patches import undo_patches


class StageRegistration:
    """Registers a DeepSpeed config with transformers, from construction to ``close``.

    With stage 3 registered, transformers builds models partitioned, generates on all ranks
    together, and runs also the layers that LayerDrop skips. It keeps only a weak reference, so this
    object must be kept meanwhile. It has the attributes that transformers reads; transformers' own
    class for them needs accelerate.
    """

    def __init__(self, stage: int, config: Callable[[], dict[str, Any]] = dict) -> None:
        """Register when the stage is 3, unregister otherwise.

        Args:
            stage: ZeRO stage.
            config: function that returns the DeepSpeed config; needed where models are built.
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
        """Restore the former registration, unless a user has registered a config since."""
        present = compat.registered_config()
        # A registration inside of this one that an interrupt kept from closing ends here too.
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
    """Registers a resolved config, by which transformers then builds models, until ``close``."""

    def __init__(self, resolved: ResolvedConfig) -> None:
        """Register with transformers when the stage is 3, unregister otherwise."""
        super().__init__(resolved.stage, resolved.to_deepspeed)

    def close(self) -> None:
        """Restore the former registration, and undo the changes that DeepSpeed leaves in torch."""
        super().close()
        undo_patches()


class ForwardRegistration:
    """Registers stage 3 with transformers during every forward pass of a partitioned module.

    LayerDrop (Wav2Vec2 and its kind) must run a layer on all ranks or on none, and AdaLoRA gathers
    parameters for its regularisation; both ask transformers for the stage.
    """

    def __init__(self, module: torch.nn.Module, resolved: ResolvedConfig) -> None:
        """Add hooks to ``module``: a model, or the engine around it."""
        self._resolved = resolved
        self._open: list[StageRegistration] = []
        self._hooks = (
            module.register_forward_pre_hook(self._begin, prepend=True),
            module.register_forward_hook(self._end, always_call=True),
        )

    def remove(self) -> None:
        """Remove the hooks, and close registrations that an interrupt kept from closing."""
        for hook in self._hooks:
            hook.remove()
        while self._open:
            self._end()

    def _begin(self, *_: object) -> None:
        self._open.append(StageRegistration(3, self._resolved.to_deepspeed))

    def _end(self, *_: object) -> None:
        if self._open:
            self._open.pop().close()
