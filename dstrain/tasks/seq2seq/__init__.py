"""Train a sequence-to-sequence model on pairs of texts: from scratch or from a checkpoint."""

from __future__ import annotations

from typing import Any


def argument_classes() -> list[type[Any]]:
    """Return the dataclasses whose fields are this task's flags; import no torch."""
    from dstrain.arguments import Seq2SeqTrainingArguments
    from dstrain.tasks.seq2seq.arguments import DataArguments, ModelArguments

    return [Seq2SeqTrainingArguments, ModelArguments, DataArguments]


def run(*instances: Any) -> int:
    """Run the task with instances of ``argument_classes``, in order; return the exit status."""
    from dstrain.tasks.seq2seq.job import run as run_job

    return run_job(*instances)
