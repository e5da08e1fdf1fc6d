"""Reading a checkpoint's ``trainer_state.json`` and ``training_arguments.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.core.documents import Count, Flag, Number, Plain, Text, Total, read_document

STATE = "trainer_state.json"
ARGUMENTS = "training_arguments.json"


@dataclass(frozen=True)
class TrainerStateRecord:
    """Fields of ``TrainerState`` in a checkpoint; None for fields that the file lacks.

    Attributes:
        global_step: optimizer steps done.
        epoch: epochs done, with the fraction of the current one.
        num_input_tokens_seen: input tokens seen, as the trainer counts them.
        total_flos: floating-point operations so far.
        log_history: all logged entries.
        best_metric: metric of the best evaluation.
        best_global_step: step of the best evaluation.
        best_model_checkpoint: folder of the best checkpoint, under its name at the time.
        stateful_callbacks: class name of a callback -> its state, or a list of states for several;
            their content is checked by the callbacks alone.
        train_batch_size: transformers' field: samples per step and process.
        logging_steps: optimizer steps between two logs.
        eval_steps: optimizer steps between two evaluations.
        save_steps: optimizer steps between two checkpoints.
    """

    global_step: Count | None = None
    epoch: Total | None = None
    num_input_tokens_seen: Total | None = None
    total_flos: Total | None = None
    log_history: list[Plain] | None = None
    best_metric: Number | None = None
    best_global_step: Count | None = None
    best_model_checkpoint: Text | None = None
    stateful_callbacks: Mapping[Text, Any] | None = None
    train_batch_size: Count | None = None
    logging_steps: Number | None = None
    eval_steps: Number | None = None
    save_steps: Number | None = None


@dataclass(frozen=True)
class ArgumentsRecord:
    """Arguments that determine the best model of a saved run."""

    metric_for_best_model: Text | None = None
    greater_is_better: Flag | None = None


def read_trainer_state(folder: Path) -> TrainerStateRecord:
    """Read the ``TrainerState`` that a checkpoint holds.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    return read_document(folder / STATE, TrainerStateRecord)


def read_arguments(folder: Path) -> ArgumentsRecord | None:
    """Read the arguments of a checkpoint's run; None where the checkpoint has none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / ARGUMENTS
    return read_document(path, ArgumentsRecord) if path.exists() else None
