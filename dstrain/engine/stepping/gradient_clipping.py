"""Clipping of gradients, and their norm, where DeepSpeed leaves gradients to torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dstrain.config import ResolvedConfig
from dstrain.engine.zero import clip_scalars_too


class GradientClipping:
    """Clips the gradients of stage 0 in fp32 before the step, so that callbacks see the result.

    transformers clips before ``on_pre_optimizer_step``. In other runs DeepSpeed clips in its step,
    where nobody can reach the gradients, and this does nothing.
    """

    def __init__(
        self,
        deepspeed_engine: Any,
        module: torch.nn.Module,
        resolved: ResolvedConfig,
        *,
        trains: bool,
        has_scalars: bool,
    ) -> None:
        """Take clipping over from DeepSpeed's step.

        Args:
            deepspeed_engine: DeepSpeed's.
            module: the model.
            resolved: the config of the run.
            trains: whether the engine has an optimizer.
            has_scalars: whether a parameter has the shape ().
        """
        self._engine, self._module = deepspeed_engine, module
        # With plain fp32 and stage 0 DeepSpeed keeps no norm, so it is computed on request.
        self._computes_norm = resolved.stage == 0 and resolved.precision == "fp32"
        if self._computes_norm and has_scalars:
            clip_scalars_too(deepspeed_engine)
        self._clip: Callable[[], object] = _do_nothing
        self._is_done = False
        self._norm: torch.Tensor | None = None
        if self._computes_norm and trains and not deepspeed_engine.torch_autocast_z0_gradscaler:
            self._clip = deepspeed_engine.clip_fp32_gradients
            deepspeed_engine.clip_fp32_gradients = _do_nothing

    def clip(self, *, want_norm: bool) -> None:
        """Clip, and keep the norm of before where it is wanted; once per step."""
        if self._is_done:
            return
        self._is_done = True
        if want_norm and self._computes_norm:
            grads = [p.grad for p in self._module.parameters() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(grads)
        if self._engine.gradient_clipping() > 0:
            self._clip()

    def finish(self) -> torch.Tensor | None:
        """Return the norm that ``clip`` computed, if any, and be ready for the next step."""
        norm, self._norm, self._is_done = self._norm, None, False
        return norm


def _do_nothing() -> None:
    """Stand for DeepSpeed's clipping, which has been done by then."""
