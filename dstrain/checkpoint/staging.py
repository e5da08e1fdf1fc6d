"""Staging folder, in which a checkpoint is written before it is committed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.checkpoint import folders
from dstrain.core.errors import ModelError, Problem
from dstrain.core.ranks import gather_objects


@dataclass(frozen=True)
class Staging:
    """Staging folder, known to the rank that made it, and to other ranks through ``agreed``.

    Attributes:
        path: the folder; None on ranks that did not make it.
        failure: reason why the folder could not be made.
    """

    path: Path | None = None
    failure: str | None = None

    def agreed(self, maker: int, *, group: Any = None) -> Path:
        """Share the path of the folder and check that every rank sees it; a collective.

        Args:
            maker: the rank that made this rank's folder.
            group: process group of all ranks.

        Raises:
            ModelError: a folder could not be made, or a rank does not see its folder; raised on all
                ranks.
        """
        told = gather_objects(self, group=group)
        if failures := [staging.failure for staging in told if staging.failure is not None]:
            raise ModelError(Problem("; ".join(failures)))
        path = told[maker].path
        assert path is not None
        seen = gather_objects(path.is_dir(), group=group)
        if blind := [rank for rank, sees in enumerate(seen) if not sees]:
            raise ModelError(
                Problem(
                    f"ranks {blind} do not see {path.parent}",
                    "a checkpoint is written by all ranks into one folder",
                    "put output_dir on a disk that all machines share, or set save_on_each_node",
                )
            )
        return path


@contextlib.contextmanager
def new_staging(output_dir: Path, step: int) -> Iterator[Staging]:
    """Make a staging folder for a step's checkpoint; remove it on exit unless it was committed."""
    with contextlib.ExitStack() as held:
        try:
            path = folders.new_staging(output_dir, step)
        except OSError as error:
            staging = Staging(failure=f"no folder can be made in {output_dir}: {error}")
        else:
            staging = Staging(path)
            held.callback(folders.discard_if_there, path)
            held.enter_context(folders.holding(path))
        yield staging
