"""Functions that several actions of ``dstrain checkpoint`` use."""

from __future__ import annotations

import sys
from pathlib import Path

from dstrain.core.errors import CheckpointError, Problem


def checkpoints(folder: Path) -> list[Path]:
    """Return ``[folder]`` for a checkpoint, or the checkpoints in a run's folder, oldest first.

    Raises:
        CheckpointError: the folder is no checkpoint, and has none in it.
    """
    from dstrain.checkpoint import committed

    if (folder / "manifest.json").exists():
        return [folder]
    found = [checkpoint.folder for checkpoint in committed(folder)]
    if not found:
        raise CheckpointError(
            Problem(
                f"{str(folder)!r} is no checkpoint and has none in it",
                "a checkpoint has a manifest.json",
                "name a run's output_dir, or a checkpoint-N folder in it",
            )
        )
    return found


def quiet() -> bool:
    """Tell whether progress bars are left out, because standard error is no terminal."""
    return not sys.stderr.isatty()


def size(num_bytes: int) -> str:
    """Format a number of bytes with a unit, such as "1.5 GB"."""
    size, units = float(num_bytes), ["B", "KB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"
