"""The folder in which a checkpoint is written before it is committed."""

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
    """A folder, known to the rank that made it, and to the others once they have agreed.

    Attributes:
        path: the folder.
        failure: why there is none.
    """

    path: Path | None = None
    failure: str | None = None

    def agreed(self, maker: int, *, group: Any = None) -> Path:
        """Return the folder once every rank that writes into it has seen it; a collective.

        Args:
            maker: the rank that made this rank's folder.
            group: of all ranks.

        Raises:
            ModelError: one could not be made, or a rank does not see its own; on all ranks.
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
    """Make a new folder for a step's checkpoint; remove it afterwards unless it was committed."""
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
