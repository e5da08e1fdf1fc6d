"""Arguments about evaluation during training."""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.arguments.fields import arg
from dstrain.core.errors import Problem


@dataclass
class EvaluationArguments:
    """When to evaluate and what an evaluation keeps."""

    eval_strategy: str = arg(
        "no",
        "Evaluate never, every eval_steps, or after each epoch.",
        choices=("no", "steps", "epoch"),
    )
    eval_steps: float | None = arg(
        None,
        "Optimizer steps between two evaluations; below 1 it is a share of all steps; none takes "
        "logging_steps.",
    )
    eval_delay: float = arg(
        0, "Steps (or epochs, with eval_strategy epoch) before the first evaluation."
    )
    eval_on_start: bool = arg(False, "Evaluate once before the first optimizer step.")

    def _evaluation_problems(self) -> list[Problem]:
        if self.eval_strategy == "steps" and self.eval_steps is not None and self.eval_steps <= 0:
            return [
                Problem(
                    f"eval_steps={self.eval_steps} with eval_strategy='steps'",
                    "a positive number of steps, or a share of all steps, is needed",
                )
            ]
        if self.eval_steps and self.eval_steps > 1 and not float(self.eval_steps).is_integer():
            return [Problem(f"eval_steps={self.eval_steps}", "above 1 it must be a whole number")]
        return []
