"""Checkpoints in DeepSpeed's layout: pickles, which only the same topology can load."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.core.errors import CheckpointError, ModelError, Problem
from dstrain.core.ranks import all_or_none
from dstrain.engine.quiet import quiet


def write_pickles(deepspeed_engine: Any, folder: Path, tag: str) -> None:
    """Write ``folder/tag`` as ``DeepSpeedEngine.save_checkpoint`` does; a collective of all ranks.

    Raises:
        ModelError: a rank could not write; raised on every rank.
    """
    failures: list[Exception] = []
    with quiet(), _reaching_the_barrier(deepspeed_engine, failures):
        deepspeed_engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    with all_or_none():
        if failures:
            reason = f"{type(failures[0]).__name__}: {failures[0]}"
            raise ModelError(Problem(f"DeepSpeed could not write into {folder / tag}", reason))


@dataclass(frozen=True)
class Unpickling:
    """A user's permission to unpickle the files of a checkpoint, which can execute any code.

    Only ``dstrain.checkpoint.native.unpickling`` creates it, after checking that the user has given
    the permission; ``TrainingState.load_native`` cannot be called without.

    Attributes:
        folder: the checkpoint.
        tag: name of the folder in it that contains the pickles.
    """

    folder: Path
    tag: str


def read_pickles(deepspeed_engine: Any, allowed: Unpickling) -> None:
    """Load DeepSpeed's files into a newly built engine; a collective of all ranks.

    Args:
        deepspeed_engine: the engine.
        allowed: the permission to unpickle the files, which names them.

    Raises:
        CheckpointError: DeepSpeed does not find the files.
    """
    folder, tag = str(allowed.folder), allowed.tag
    with quiet():
        # The schedule is restored from run.json, since this run may have another kind of schedule.
        path, _ = deepspeed_engine.load_checkpoint(folder, tag=tag, load_lr_scheduler_states=False)
    if path is None:
        raise CheckpointError(Problem(f"DeepSpeed finds no checkpoint {tag!r} in {folder}"))


@contextlib.contextmanager
def _reaching_the_barrier(deepspeed_engine: Any, failures: list[Exception]) -> Iterator[None]:
    """Collect errors of writing in the block instead of raising them.

    A rank that cannot write then still reaches the barrier in which the other ranks wait for it.

    Args:
        deepspeed_engine: the engine that saves.
        failures: gets the errors.
    """
    places = [
        (deepspeed_engine.checkpoint_engine, "save"),
        (deepspeed_engine, "_copy_recovery_script"),
    ]
    methods = [getattr(owner, name) for owner, name in places]

    def guarded(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                # torch.save raises RuntimeError for a full disk.
                failures.append(error)
                return None

        return call

    for (owner, name), method in zip(places, methods, strict=True):
        setattr(owner, name, guarded(method))
    try:
        yield
    finally:
        for owner, name in places:
            delattr(owner, name)
