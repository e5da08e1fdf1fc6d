"""Registration of a DeepSpeed config with transformers, which asks it for the ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dstrain.config import ResolvedConfig
from dstrain.engine import compat
from dstrain.engine.zero.torch_patches import undo_patches


class StageRegistration:
    """Registers a DeepSpeed config with transformers, from construction to ``close``.

    While stage 3 is registered, transformers builds models partitioned, generates on all ranks
    together, and also runs layers that LayerDrop would skip. transformers keeps a weak reference
    only, so the caller must keep this object. It has the methods that transformers calls;
    transformers' own class for the purpose needs accelerate.
    """

    def __init__(self, stage: int, config: Callable[[], dict[str, Any]] = dict) -> None:
        """Register this object if the stage is 3; remove any registration otherwise.

        Args:
            stage: ZeRO stage.
            config: returns the DeepSpeed config; needed where transformers builds models.
        """
        self._stage, self._make_config = stage, config
        self._previous = compat.registered_config()
        compat.register_config(self if stage == 3 else None)

    @property
    def config(self) -> dict[str, Any]:
        """Return the DeepSpeed config by which transformers partitions the models it builds."""
        return self._make_config()

    def is_zero3(self) -> bool:
        """Tell whether the stage is 3; transformers calls this where it builds and generates."""
        return self._stage == 3

    def is_zero2(self) -> bool:
        """Tell whether the stage is 2, as transformers expects of a registered object."""
        return self._stage == 2

    def close(self) -> None:
        """Restore the former registration, unless a user has registered another config since."""
        present = compat.registered_config()
        # Also where a registration made after this one was never closed, because of an interrupt.
        if present is None or isinstance(present, StageRegistration):
            compat.register_config(self._previous)
        self._previous = None

    def __enter__(self) -> StageRegistration:
        """Return this object; the constructor has registered it."""
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the former registration."""
        self.close()


class BuildRegistration(StageRegistration):
    """Registers a resolved config, until ``close``, for transformers to build models by it."""

    def __init__(self, resolved: ResolvedConfig) -> None:
        """Register the config if its stage is 3; remove any registration otherwise."""
        super().__init__(resolved.stage, resolved.to_deepspeed)

    def close(self) -> None:
        """Restore the former registration, and undo DeepSpeed's changes to torch."""
        super().close()
        undo_patches()


class ForwardRegistration:
    """Registers stage 3 with transformers during every forward pass of a partitioned module.

    Models with LayerDrop (such as Wav2Vec2) must run a layer on all ranks or on none, and AdaLoRA
    gathers parameters for its regularisation term; both ask transformers for the stage.
    """

    def __init__(self, module: torch.nn.Module, resolved: ResolvedConfig) -> None:
        """Add hooks to ``module``, which is a model or its DeepSpeed engine."""
        self._resolved = resolved
        self._open: list[StageRegistration] = []
        self._hooks = (
            module.register_forward_pre_hook(self._begin, prepend=True),
            module.register_forward_hook(self._end, always_call=True),
        )

    def remove(self) -> None:
        """Remove the hooks, and close registrations that an interrupted forward pass left open."""
        for hook in self._hooks:
            hook.remove()
        while self._open:
            self._end()

    def _begin(self, *_: object) -> None:
        """Register stage 3 at the start of a forward pass."""
        self._open.append(StageRegistration(3, self._resolved.to_deepspeed))

    def _end(self, *_: object) -> None:
        """Close the registration of the innermost forward pass."""
        if self._open:
            self._open.pop().close()
