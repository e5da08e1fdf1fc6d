"""Arguments about batches and the length of the run."""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.arguments.fields import arg
from dstrain.arguments.treatment import alias, deepspeed_key, implemented
from dstrain.core.errors import Problem


@dataclass
class BatchArguments:
    """Micro-batch, accumulation, and length of the run."""

    per_device_train_batch_size: int = arg(
        8,
        "Micro-batch: samples per rank in one forward and backward pass.",
        treatment=deepspeed_key("train_micro_batch_size_per_gpu"),
    )
    per_device_eval_batch_size: int = arg(
        8, "Samples per rank in one evaluation forward pass.", treatment=implemented()
    )
    per_gpu_train_batch_size: int | None = arg(
        None,
        "Old name of per_device_train_batch_size.",
        treatment=alias("per_device_train_batch_size"),
    )
    per_gpu_eval_batch_size: int | None = arg(
        None,
        "Old name of per_device_eval_batch_size.",
        treatment=alias("per_device_eval_batch_size"),
    )
    gradient_accumulation_steps: int = arg(
        1,
        "Micro-batches per rank between two optimizer steps; fewer at the end of an epoch.",
        treatment=deepspeed_key("gradient_accumulation_steps"),
    )
    auto_find_batch_size: bool = arg(
        False,
        "Go on with a smaller micro-batch when memory runs out.",
        treatment=implemented(
            "half or less, at the step where it happened, on all ranks; accumulation grows so that "
            "the global batch stays"
        ),
    )
    num_train_epochs: float = arg(
        3.0, "Passes over the training data; a fraction is allowed.", treatment=implemented()
    )
    max_steps: int = arg(
        -1,
        "Optimizer steps in all; above 0 it overrides num_train_epochs and data is repeated.",
        treatment=implemented(),
    )

    def _batch_problems(self) -> list[Problem]:
        problems = []
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            value = getattr(self, name)
            if value < 1:
                problems.append(Problem(f"{name}={value}", "at least 1 is needed"))
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            problems.append(
                Problem(
                    f"num_train_epochs={self.num_train_epochs} with max_steps={self.max_steps}",
                    "the run would have no optimizer step",
                    "set num_train_epochs > 0, or max_steps > 0",
                )
            )
        return problems
