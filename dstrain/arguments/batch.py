"""Arguments about batches, duration and data loading."""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.arguments.fields import arg
from dstrain.core.errors import Problem


@dataclass
class BatchArguments:
    """Micro-batch, accumulation, how long to train, and how batches are read."""

    per_device_train_batch_size: int = arg(
        8, "Micro-batch: samples per rank in one forward and backward pass."
    )
    per_device_eval_batch_size: int = arg(8, "Samples per rank in one evaluation forward pass.")
    gradient_accumulation_steps: int = arg(
        1,
        "Micro-batches per rank between two optimizer steps; fewer at the end of an epoch.",
    )
    num_train_epochs: float = arg(3.0, "Passes over the training data; a fraction is allowed.")
    max_steps: int = arg(
        -1, "Optimizer steps in all; above 0 it overrides num_train_epochs and data is repeated."
    )
    dataloader_drop_last: bool = arg(
        False,
        "Drop the samples at the end of an epoch that do not fill a micro-batch on every rank. "
        "Evaluation never drops samples.",
    )
    dataloader_num_workers: int = arg(
        0, "Loader processes per rank; 0 loads in the training process."
    )
    dataloader_prefetch_factor: int | None = arg(
        None, "Batches that each loader process prepares ahead; needs dataloader_num_workers > 0."
    )
    dataloader_pin_memory: bool = arg(
        True,
        "Put batches into page-locked host memory, which makes the copy to a GPU asynchronous.",
    )
    dataloader_persistent_workers: bool = arg(
        False, "Keep loader processes alive between the epochs of a run."
    )
    remove_unused_columns: bool = arg(
        True, "Drop dataset columns that the model's forward does not take."
    )
    label_names: list[str] | None = arg(
        None, "Batch keys that are labels; none finds them in the signature of the model's forward."
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
        if self.dataloader_num_workers < 0:
            problems.append(
                Problem(f"dataloader_num_workers={self.dataloader_num_workers}", "0 or more")
            )
        if self.dataloader_prefetch_factor is not None and self.dataloader_prefetch_factor < 1:
            problems.append(
                Problem(
                    f"dataloader_prefetch_factor={self.dataloader_prefetch_factor}",
                    "at least 1 is needed",
                )
            )
        if self.dataloader_num_workers == 0 and self.dataloader_persistent_workers:
            problems.append(
                Problem(
                    "dataloader_persistent_workers=True with dataloader_num_workers=0",
                    "there are no loader processes to keep",
                    "set dataloader_num_workers to 1 or more, or persistent workers to false",
                )
            )
        if self.dataloader_num_workers == 0 and self.dataloader_prefetch_factor is not None:
            problems.append(
                Problem(
                    f"dataloader_prefetch_factor={self.dataloader_prefetch_factor} with "
                    "dataloader_num_workers=0",
                    "only loader processes prefetch",
                    "set dataloader_num_workers to 1 or more, or leave the factor out",
                )
            )
        return problems
