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
    """The parts of ``TrainerState`` that a checkpoint states; None for those that it lacks.

    Attributes:
        global_step: optimizer steps done.
        epoch: with its part that is done.
        num_input_tokens_seen: as the trainer counts them.
        total_flos: floating-point operations so far.
        log_history: everything that was logged.
        best_metric: of the best evaluation.
        best_global_step: of the best evaluation.
        best_model_checkpoint: folder of the best checkpoint, as it was called then.
        stateful_callbacks: class of a callback -> its state, or those of several; their content is
            for the callbacks to judge.
        train_batch_size: of transformers; samples per step and process.
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
    """The arguments by which a saved run chose its best model."""

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
