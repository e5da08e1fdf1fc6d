"""DeepSpeed's own checkpoint layout: pickles that fit one topology only."""

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
    """The permission to let DeepSpeed execute the pickles of a folder.

    Made in one place, ``dstrain.checkpoint.native.unpickling``, which asks whether the user gave
    it: nothing else can call ``TrainingState.load_native``.

    Attributes:
        folder: the checkpoint.
        tag: the folder in it that has the pickles.
    """

    folder: Path
    tag: str


def read_pickles(deepspeed_engine: Any, allowed: Unpickling) -> None:
    """Load DeepSpeed's files into a fresh engine, unpickling them; a collective of all ranks.

    Raises:
        CheckpointError: DeepSpeed does not find them.
    """
    folder, tag = str(allowed.folder), allowed.tag
    with quiet():
        # The schedule's state is in run.json, and may be of another kind than this run's.
        path, _ = deepspeed_engine.load_checkpoint(folder, tag=tag, load_lr_scheduler_states=False)
    if path is None:
        raise CheckpointError(Problem(f"DeepSpeed finds no checkpoint {tag!r} in {folder}"))


@contextlib.contextmanager
def _reaching_the_barrier(deepspeed_engine: Any, failures: list[Exception]) -> Iterator[None]:
    """Let a rank that cannot write go on to the barrier, where the other ranks wait for it."""
    places = [
        (deepspeed_engine.checkpoint_engine, "save"),
        (deepspeed_engine, "_copy_recovery_script"),
    ]
    methods = [getattr(owner, name) for owner, name in places]

    def guarded(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except (
                OSError,
                RuntimeError,
            ) as error:  # torch.save raises RuntimeError for a full disk
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
