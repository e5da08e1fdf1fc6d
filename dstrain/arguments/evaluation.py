"""Arguments about evaluation during training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dstrain.arguments.fields import arg
from dstrain.arguments.optimizer import METRIC_SCHEDULERS
from dstrain.arguments.treatment import alias, implemented, no_effect
from dstrain.core.errors import Problem


def _with_inputs(arguments: Any, value: bool) -> list[str]:
    """Return ``include_for_metrics`` with the inputs added."""
    return list(dict.fromkeys([*arguments.include_for_metrics, "inputs"]))


@dataclass
class EvaluationArguments:
    """Evaluation: its times, its predictions and their memory."""

    eval_strategy: str = arg(
        "no",
        "Evaluate never, every eval_steps, or after each epoch.",
        choices=("no", "steps", "epoch"),
        treatment=implemented(),
    )
    evaluation_strategy: str | None = arg(
        None, "Old name of eval_strategy.", treatment=alias("eval_strategy")
    )
    eval_steps: float | None = arg(
        None,
        "Optimizer steps between two evaluations; below 1 it is a share of all steps; none or 0 "
        "takes logging_steps.",
        treatment=implemented(),
    )
    eval_delay: float = arg(
        0,
        "Steps (or epochs, with eval_strategy epoch) before the first evaluation.",
        treatment=implemented(),
    )
    eval_on_start: bool = arg(
        False, "Evaluate once before the first optimizer step.", treatment=implemented()
    )
    prediction_loss_only: bool = arg(
        False,
        "Compute the loss alone, no predictions.",
        treatment=implemented(),
    )
    eval_accumulation_steps: int | None = arg(
        None,
        "Evaluation batches whose predictions stay on the accelerator before they move to the "
        "host.",
        treatment=implemented("none moves each batch at once, so that nothing piles up"),
    )
    eval_do_concat_batches: bool = arg(
        True,
        "Join the predictions of all batches for compute_metrics instead of a list of batches.",
        treatment=implemented(),
    )
    eval_use_gather_object: bool | None = arg(
        False,
        "Gather predictions that are Python objects, not tensors.",
        treatment=implemented("a list has an entry per sample; such predictions stay in memory"),
    )
    batch_eval_metrics: bool = arg(
        False,
        "Call compute_metrics for each batch, which keeps no predictions.",
        treatment=implemented("on rank 0, with the batch of all ranks"),
    )
    eval_memory_mb: int = arg(
        64,
        "MiB of rank 0's memory for the predictions, labels and inputs of an evaluation; what is "
        "beyond is in files in output_dir, which compute_metrics and predict() see as memory maps.",
        treatment=implemented(own=True),
    )
    include_for_metrics: list[str] = arg(
        [],
        "Values that compute_metrics gets besides predictions and labels: inputs, loss.",
        treatment=implemented(),
    )
    include_inputs_for_metrics: bool = arg(
        False,
        "Old way to write include_for_metrics=['inputs'].",
        treatment=alias("include_for_metrics", convert=_with_inputs, note="adds 'inputs'"),
    )
    label_names: list[str] | None = arg(
        None,
        "Batch keys that are labels; none finds them in the signature of the model's forward.",
        treatment=implemented(),
    )
    use_legacy_prediction_loop: bool = arg(
        False,
        "Evaluate with an older loop of transformers.",
        treatment=no_effect("there is one evaluation loop"),
    )

    def _evaluation_problems(self, lr_scheduler_type: str) -> list[Problem]:
        problems = []
        if self.eval_strategy == "steps" and self.eval_steps is not None and self.eval_steps <= 0:
            problems.append(
                Problem(
                    f"eval_steps={self.eval_steps} with eval_strategy='steps'",
                    "a positive number of steps, or a share of all steps, is needed",
                    "set eval_steps, or logging_steps, which is its default",
                )
            )
        if self.eval_steps and self.eval_steps > 1 and not float(self.eval_steps).is_integer():
            problems.append(
                Problem(f"eval_steps={self.eval_steps}", "above 1 it must be a whole number")
            )
        if lr_scheduler_type in METRIC_SCHEDULERS and self.eval_strategy == "no":
            problems.append(
                Problem(
                    f"lr_scheduler_type={lr_scheduler_type!r} with eval_strategy='no'",
                    "the schedule follows a metric, which only an evaluation has",
                    "set eval_strategy to steps or epoch",
                )
            )
        unknown = [n for n in self.include_for_metrics if n not in ("inputs", "loss")]
        if unknown:
            problems.append(
                Problem(f"include_for_metrics={unknown}", "there is inputs, and there is loss")
            )
        if self.eval_memory_mb < 0:
            problems.append(Problem(f"eval_memory_mb={self.eval_memory_mb}", "it is a size"))
        if self.eval_accumulation_steps is not None and self.eval_accumulation_steps < 1:
            problems.append(
                Problem(
                    f"eval_accumulation_steps={self.eval_accumulation_steps}",
                    "at least 1 is needed",
                )
            )
        return problems
