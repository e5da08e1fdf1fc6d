"""Corrections of three faults of DeepSpeed 0.19.8 at stage 0 in 16-bit formats.

Its ``FP16_UnfusedOptimizer`` and ``FP16_Optimizer``, which it uses only there,

1. allocate optimizer state by *taking a step* with zero gradients, so Adam's bias correction starts
   at step 2 (the first real update is 0.74 of what it should be) and weight decay is applied once
   too often to the master weights;
2. divide gradients by the fp16 loss scale, while ``engine.backward`` multiplies the loss by it only
   for ZeRO optimizers: gradients end up 65536 times too small;
3. raise the loss scale *before* dividing by it, so at the end of every scale window one step uses
   half its gradient.
"""

from __future__ import annotations

from typing import Any

import torch


class StageZeroCorrection:
    """Corrects one of these optimizers around every step."""

    def __init__(self, optimizer: Any) -> None:
        """Undo the optimizer's step with zero gradients, and take over updates of the loss scale.

        Args:
            optimizer: DeepSpeed's wrapper, which has taken no other step.
        """
        self._config = optimizer.loss_scale_config
        self._update_scale = optimizer._update_scale
        self._update_is_due = False
        self._scale_in_use = float(self._config.cur_scale)
        self._norm_is_unscaled = hasattr(optimizer, "fp32_groups_flat")
        optimizer._update_scale = self._update_later
        _undo_phantom_step(optimizer)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss multiplied by the loss scale."""
        self._scale_in_use = float(self._config.cur_scale)
        return loss * self._scale_in_use if self._scale_in_use != 1.0 else loss

    def unscaled(self, norm: Any) -> Any:
        """Return a gradient norm divided by the loss scale, where DeepSpeed has not divided it."""
        if norm is None or self._norm_is_unscaled:
            return norm
        return norm / self._scale_in_use

    def after_step(self) -> None:
        """Update the loss scale after a step that was applied, whose gradients are unscaled now."""
        if self._update_is_due:
            self._update_is_due = False
            self._update_scale(False)

    def _update_later(self, skip: bool) -> None:
        """Update the loss scale at once if the step is skipped, and after the step otherwise."""
        if skip:
            self._update_scale(True)
        else:
            self._update_is_due = True


def stage_zero_correction(optimizer: Any) -> StageZeroCorrection | None:
    """Return the correction for the two optimizers of DeepSpeed that need it; None for others."""
    needs = hasattr(optimizer, "loss_scale_config") and hasattr(optimizer, "_update_scale")
    return StageZeroCorrection(optimizer) if needs else None


def _undo_phantom_step(optimizer: Any) -> None:
    """Undo the step with zero gradients: clear the state, and copy weights to master weights."""
    inner = optimizer.optimizer
    inner.state.clear()
    for group in inner.param_groups:
        if "step" in group:
            counts = group["step"]
            group["step"] = torch.zeros_like(counts) if torch.is_tensor(counts) else 0
        group.pop("state", None)  # where grokadamw keeps its state
    flat = getattr(optimizer, "fp32_groups_flat", None)
    with torch.no_grad():
        if flat is not None:
            for master, weights in zip(flat, optimizer.fp16_groups, strict=True):
                master.copy_(torch.cat([w.reshape(-1) for w in weights]))
            return
        for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                master.copy_(weight)
