"""Folders of NVMe offload that belong to one model or optimizer alone, and reading from them.

DeepSpeed names its files by rank and parameter, and empties the folder of parameters when it
begins. So two jobs on a machine, or two models in a process, would overwrite each other's weights
if they had the same folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any


class SwapFolder:
    """A new folder inside the ``nvme_path`` of a config."""

    def __init__(self, config: dict[str, Any], section: str) -> None:
        """Make the folder and put it into the config; do nothing without offload to NVMe.

        Args:
            config: DeepSpeed's, which is changed.
            section: ``offload_optimizer`` or ``offload_param``.
        """
        self._path: Path | None = None
        zero = config.get("zero_optimization", {})
        offload = zero.get(section) or {}
        if offload.get("device") == "nvme":
            self._path = Path(tempfile.mkdtemp(prefix="dstrain-", dir=offload["nvme_path"]))
            offload = {**offload, "nvme_path": str(self._path)}
            config["zero_optimization"] = {**zero, section: offload}

    def remove_with(self, owner: Any) -> None:
        """Remove the folder once DeepSpeed's swapper of it is garbage-collected, or at exit."""
        if self._path is None:
            return
        if owner is None:  # nothing is offloaded, as by an engine without an optimizer
            _remove(self._path, os.getpid())
        else:
            weakref.finalize(owner, _remove, self._path, os.getpid())


def read_once(swapper: Any) -> None:
    """Let DeepSpeed's swapper of parameters read each partition once.

    The list of what is used next has a parameter twice that is used in two modules or at the end of
    the forward pass; DeepSpeed raises an AssertionError at its second occurrence.
    """
    if swapper is None:
        return
    swap_in = swapper.swap_in

    def read(params: list[Any], *args: Any, **kwargs: Any) -> None:
        swap_in(list(dict.fromkeys(params)), *args, **kwargs)

    swapper.swap_in = read


def _remove(folder: Path, process: int) -> None:
    """Remove a folder, unless this process is a fork of the one that made it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
