"""A correction of DeepSpeed's Adam on the host: its bias correction follows from the step alone."""

from __future__ import annotations

from typing import Any

import torch


def correct_bias_by_step(optimizer: Any) -> None:
    """Make ``DeepSpeedCPUAdam`` compute ``beta ** step`` anew in every step.

    Its C++ object (``includes/cpu_adam.h``, ``IncrementStep``) keeps both powers in fp32 and
    multiplies them by beta each step, so that they gather rounding errors, and computes them with
    ``pow`` where the step is not the one after the last, as in the first step after a resume. A
    resumed run would differ from the one that never stopped. A change of betas makes it use
    ``pow`` as well: before each step a number outside of the model is updated with betas of 0.

    Does nothing for other optimizers.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    if not isinstance(optimizer, DeepSpeedCPUAdam):
        return
    unused = [torch.zeros(1) for _ in range(4)]  # a parameter, its gradient, both moments
    settings = {"step": 1, "lr": 0.0, "beta1": 0.0, "beta2": 0.0, "eps": 1.0, "weight_decay": 0.0}

    def forget_powers(adam: Any, args: Any, kwargs: Any) -> None:
        adam.ds_opt_adam.adam_update(adam.opt_id, *settings.values(), True, *unused)

    optimizer.register_step_pre_hook(forget_powers)
