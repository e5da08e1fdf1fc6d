"""DeepSpeed's own way to write and read the state of an engine: pickles, for one topology only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstrain.core.errors import CheckpointError, ModelError, Problem
from dstrain.core.ranks import all_or_none
from dstrain.engine.quiet import quiet

if TYPE_CHECKING:
    from dstrain.engine.engine import Engine


def save_native(engine: Engine, folder: Path, tag: str) -> None:
    """Write ``folder/tag`` as ``DeepSpeedEngine.save_checkpoint`` does; a collective of all ranks.

    Raises:
        ModelError: a rank could not write; raised on every rank.
    """
    failures: list[Exception] = []
    if engine.changes is not None:
        engine.changes.take_over()
    with quiet(), _to_the_end(engine.model, failures):
        engine.model.save_checkpoint(str(folder), tag=tag, save_latest=False)
    with all_or_none():
        if failures:
            reason = f"{type(failures[0]).__name__}: {failures[0]}"
            raise ModelError(Problem(f"DeepSpeed could not write into {folder / tag}", reason))


@dataclass(frozen=True)
class Unpickling:
    """The word that DeepSpeed may execute what is in the pickles of a folder.

    Made in one place, ``dstrain.checkpoint.native.unpickling``, which asks whether the user gave
    it: nothing else can call ``load_native``.

    Attributes:
        folder: the checkpoint.
        tag: the folder in it that has the pickles.
    """

    folder: Path
    tag: str


def load_native(engine: Engine, allowed: Unpickling) -> None:
    """Load DeepSpeed's files into a fresh engine; a collective of all ranks. It unpickles.

    Raises:
        CheckpointError: DeepSpeed does not find them.
    """
    folder, tag = str(allowed.folder), allowed.tag
    with quiet():
        # The schedule's state is in run.json, and may be of another kind than this run's.
        path, _ = engine.model.load_checkpoint(folder, tag=tag, load_lr_scheduler_states=False)
    if path is None:
        raise CheckpointError(Problem(f"DeepSpeed finds no checkpoint {tag!r} in {folder}"))


@contextlib.contextmanager
def _to_the_end(model: Any, failures: list[Exception]) -> Iterator[None]:
    """Let a rank that cannot write go on to the barrier, where the others wait for it."""
    places = [(model.checkpoint_engine, "save"), (model, "_copy_recovery_script")]
    methods = [getattr(owner, name) for owner, name in places]

    def guarded(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except (OSError, RuntimeError) as error:  # torch.save says of a full disk: RuntimeError
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
