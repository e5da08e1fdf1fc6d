"""Helpers that the actions of ``dstrain checkpoint`` share."""

from __future__ import annotations

import sys
from pathlib import Path

from dstrain.core.errors import CheckpointError, Problem


def checkpoints(folder: Path) -> list[Path]:
    """List the folder itself if it is a checkpoint, else those of the run in it, oldest first.

    Raises:
        CheckpointError: it is neither.
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
    """Tell whether to show no progress bars, because they would end up in a file."""
    return not sys.stderr.isatty()


def size(num_bytes: int) -> str:
    """Format a number of bytes for people."""
    size, units = float(num_bytes), ["B", "KB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"
