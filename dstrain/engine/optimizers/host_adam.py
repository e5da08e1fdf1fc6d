"""Correction of the bias correction of DeepSpeed's Adam on the host.

It must depend on the step alone: otherwise a resumed run differs from one that never stopped.
"""

from __future__ import annotations

from typing import Any

import torch


def correct_bias_by_step(optimizer: Any) -> None:
    """Make ``DeepSpeedCPUAdam`` compute ``beta ** step`` with ``pow`` in every step.

    Its C++ object (``includes/cpu_adam.h``, ``IncrementStep``) keeps both powers in fp32 and
    multiplies them by beta in each step, so that rounding errors accumulate. It computes them with
    ``pow`` if the step does not follow the last one, as in the first step after a resume, or if the
    betas have changed. This function makes it use ``pow`` always: before each step, it updates a
    number outside of the model with betas of 0.

    Does nothing for other optimizers.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    if not isinstance(optimizer, DeepSpeedCPUAdam):
        return
    unused = [torch.zeros(1) for _ in range(4)]  # a parameter, its gradient, both moments
    settings = {"step": 1, "lr": 0.0, "beta1": 0.0, "beta2": 0.0, "eps": 1.0, "weight_decay": 0.0}

    def forget_powers(adam: Any, args: Any, kwargs: Any) -> None:
        """Change the betas of the C++ object, so that the next step calls ``pow``."""
        adam.ds_opt_adam.adam_update(adam.opt_id, *settings.values(), True, *unused)

    optimizer.register_step_pre_hook(forget_powers)
