"""Train a causal language model: from scratch or from a checkpoint, on text, files or datasets."""

from __future__ import annotations

from typing import Any


def argument_classes() -> list[type[Any]]:
    """Return the dataclasses whose fields are this task's flags; import no torch."""
    from dstrain.arguments import TrainingArguments
    from dstrain.tasks.causal_lm.arguments import DataArguments, ModelArguments

    return [TrainingArguments, ModelArguments, DataArguments]


def run(*instances: Any) -> int:
    """Run the task with instances of ``argument_classes``, in order; return the exit status."""
    from dstrain.tasks.causal_lm.job import run as run_job

    return run_job(*instances)
