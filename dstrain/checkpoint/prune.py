"""Removal of a run's old checkpoints on a user's command, with the safeguards of rotation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dstrain.checkpoint import folders
from dstrain.checkpoint.find import verify
from dstrain.checkpoint.trainer_state import read_trainer_state
from dstrain.core.errors import CheckpointError, Problem


@dataclass(frozen=True)
class Pruning:
    """Result of ``prune``: removed and kept checkpoints.

    Attributes:
        removed: checkpoints that were removed, or would be in a dry run.
        kept: remaining checkpoints, each with the reason.
    """

    removed: tuple[folders.Found, ...]
    kept: tuple[tuple[folders.Found, str], ...]


def prune(
    output_dir: Path,
    *,
    keep: int,
    dry_run: bool = False,
    on_file: Callable[[int], object] = lambda num_bytes: None,
) -> Pruning:
    """Remove the oldest checkpoints of a run until ``keep`` are left.

    The newest, the best and those that a process reads are never removed. Folders that dstrain has
    not made, such as links, are not removed and do not count. Nothing is removed unless the newest
    checkpoint verifies, as it may be the only one left afterwards.

    Args:
        output_dir: a run's folder.
        keep: number of checkpoints to leave, at least 1.
        dry_run: remove nothing.
        on_file: called with the bytes of each file of the newest checkpoint that has been verified.

    Raises:
        CheckpointError: the folder has no checkpoint, ``keep`` is below 1, or the newest checkpoint
            is damaged.
    """
    if keep < 1:
        raise CheckpointError(Problem(f"--keep {keep}", "at least the newest checkpoint stays"))
    found = folders.committed(output_dir)
    if not found:
        raise CheckpointError(
            Problem(f"there is no checkpoint in {str(output_dir)!r}", "", "name a run's output_dir")
        )
    best = best_of(output_dir)
    owned = folders.owned(output_dir)
    surplus = folders.surplus(output_dir, limit=keep, keep=[] if best is None else [best])
    if surplus:
        _check_newest(owned[-1], on_file)
    removed = []
    ours = {f.folder for f in owned}
    kept = {f.folder: "" if f.folder in ours else "dstrain has not made it" for f in found}
    for old in surplus:
        if folders.is_read(old.folder):
            kept[old.folder] = "a process is reading it"
        elif dry_run or folders.remove(old):
            removed.append(old)
            del kept[old.folder]
        else:
            kept[old.folder] = "it could not be removed"
    for newest in owned[-1:]:
        kept[newest.folder] = "newest" if best != newest.folder else "newest and best"
    if best is not None and kept.get(best) == "":
        kept[best] = "best"
    stay = tuple((f, kept[f.folder]) for f in found if f.folder in kept)
    return Pruning(tuple(removed), stay)


def best_of(output_dir: Path) -> Path | None:
    """Return the best checkpoint named in the newest readable ``trainer_state.json``, or None."""
    for checkpoint in reversed(folders.committed(output_dir)):
        with contextlib.suppress(CheckpointError):
            best = read_trainer_state(checkpoint.folder).best_model_checkpoint
            return None if best is None else output_dir / Path(best).name
    return None


def _check_newest(newest: folders.Found, on_file: Callable[[int], object]) -> None:
    try:
        _, problems = verify(newest.folder, on_file=on_file)
    except CheckpointError as error:
        problems = [str(problem) for problem in error.problems]
    if problems:
        raise CheckpointError(
            Problem(
                f"the newest checkpoint {newest.folder} is damaged, so nothing was removed",
                "\n".join(problems),
                "an older one may be the last good one: remove the damaged folder yourself first",
            )
        )
