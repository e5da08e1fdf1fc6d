"""Arguments about the optimizer and the learning-rate schedule."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from dstrain.arguments.fields import arg
from dstrain.core.errors import Problem

# Names of transformers.SchedulerType whose step needs nothing but the step count.
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
)


@dataclass
class OptimizerArguments:
    """Optimizer, its hyperparameters, clipping and schedule."""

    learning_rate: float = arg(5e-5, "Peak learning rate.")
    weight_decay: float = arg(
        0.0, "Decoupled weight decay of all parameters but biases and normalisation weights."
    )
    adam_beta1: float = arg(0.9, "Decay of Adam's first moment.")
    adam_beta2: float = arg(0.999, "Decay of Adam's second moment.")
    adam_epsilon: float = arg(1e-8, "Term added to Adam's denominator.")
    max_grad_norm: float = arg(
        1.0, "Global gradient norm above which gradients are scaled down; 0 turns clipping off."
    )
    optim: str = arg(
        "adamw_torch",
        "Optimizer. With optimizer offload the AdamW names run DeepSpeed's CPU Adam.",
        choices=("adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "sgd", "adagrad"),
    )
    lr_scheduler_type: str = arg(
        "linear", "Learning-rate schedule (transformers.SchedulerType).", choices=SCHEDULERS
    )
    # `str` is for HfArgumentParser, which hands over the JSON of a shell unparsed.
    lr_scheduler_kwargs: dict[str, Any] | str | None = arg(
        None, 'Extra arguments of the schedule, such as {"min_lr": 1e-6} of cosine_with_min_lr.'
    )
    warmup_ratio: float = arg(
        0.0, "Share of all steps used for warm-up; warmup_steps wins over it."
    )
    warmup_steps: float = arg(
        0, "Steps of linear warm-up from 0; a value between 0 and 1 is a share of all steps."
    )

    def scheduler_kwargs(self) -> dict[str, Any]:
        """``lr_scheduler_kwargs`` as a dict of its own, empty for none."""
        assert not isinstance(self.lr_scheduler_kwargs, str), "parsed on construction"
        return dict(self.lr_scheduler_kwargs or {})

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Warm-up steps of a run of ``num_training_steps``: the count, or the share rounded up."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(num_training_steps * (self.warmup_steps or self.warmup_ratio))

    def _read_scheduler_kwargs(self) -> list[Problem]:
        """Parse ``lr_scheduler_kwargs`` where it is still text."""
        given = self.lr_scheduler_kwargs
        if not isinstance(given, str):
            return []
        try:
            parsed = None if given.strip().lower() == "none" else json.loads(given)
        except ValueError:
            parsed = given
        if parsed is not None and not isinstance(parsed, dict):
            return [Problem(f"lr_scheduler_kwargs={given!r}", "expected a JSON object, or none")]
        self.lr_scheduler_kwargs = parsed
        return []

    def _optimizer_problems(self) -> list[Problem]:
        problems = []
        for name in ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"):
            value = getattr(self, name)
            if not value >= 0 or math.isinf(value):
                problems.append(
                    Problem(f"{name}={value}", "a finite number of 0 or more is needed")
                )
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                problems.append(Problem(f"{name}={value}", "0 <= beta < 1 is needed"))
        if not 0 <= self.warmup_ratio <= 1:
            problems.append(
                Problem(f"warmup_ratio={self.warmup_ratio}", "a share between 0 and 1 is needed")
            )
        steps = self.warmup_steps
        if steps < 0 or (steps > 1 and not float(steps).is_integer()):
            problems.append(
                Problem(
                    f"warmup_steps={steps}",
                    "a whole number of steps, or a share between 0 and 1, is needed",
                )
            )
        return problems
