"""Clipping of gradients and their norm at stage 0 in fp32, where gradients are torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dstrain.config import ResolvedConfig
from dstrain.engine.zero import clip_scalars_too, has_scalars


class GradientClipping:
    """Clips the gradients of stage 0 in fp32 before the step, so that callbacks see the result.

    transformers does so before ``on_pre_optimizer_step``. In other runs DeepSpeed clips in its
    step, and callbacks cannot read the gradients; this class does nothing then.
    """

    def __init__(
        self,
        deepspeed_engine: Any,
        module: torch.nn.Module,
        resolved: ResolvedConfig,
        *,
        trains: bool,
    ) -> None:
        """Take clipping over from DeepSpeed's step.

        Args:
            deepspeed_engine: the engine of DeepSpeed.
            module: the model.
            resolved: the config of the run.
            trains: whether the engine has an optimizer.
        """
        self._engine, self._module = deepspeed_engine, module
        # In fp32 at stage 0 DeepSpeed does not keep the norm.
        self._computes_norm = resolved.stage == 0 and resolved.precision == "fp32"
        if self._computes_norm and has_scalars(module.parameters()):
            clip_scalars_too(deepspeed_engine)
        self._clip: Callable[[], object] = _do_nothing
        self._is_done = False
        self._norm: torch.Tensor | None = None
        if self._computes_norm and trains and not deepspeed_engine.torch_autocast_z0_gradscaler:
            self._clip = deepspeed_engine.clip_fp32_gradients
            deepspeed_engine.clip_fp32_gradients = _do_nothing

    def clip(self, *, want_norm: bool) -> None:
        """Clip the gradients; only the first call before a step does anything.

        Args:
            want_norm: whether to keep the norm before clipping, for ``finish``.
        """
        if self._is_done:
            return
        self._is_done = True
        if want_norm and self._computes_norm:
            grads = [p.grad for p in self._module.parameters() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(grads)
        if self._engine.gradient_clipping() > 0:
            self._clip()

    def finish(self) -> torch.Tensor | None:
        """Return the norm that ``clip`` kept, if any, and prepare for the next step."""
        norm, self._norm, self._is_done = self._norm, None, False
        return norm


def _do_nothing() -> None:
    """Do nothing; stands for DeepSpeed's clipping in its step."""
