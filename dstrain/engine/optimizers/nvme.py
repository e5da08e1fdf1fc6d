"""Checks of NVMe offload before a model is built: the folders, and DeepSpeed's op for it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dstrain.config import ResolvedConfig
from dstrain.core.errors import ConfigError, Problem, raise_problems
from dstrain.engine import ops

_SECTIONS = ("offload_optimizer", "offload_param")


def nvme_folders(resolved: ResolvedConfig) -> dict[str, Path]:
    """Return the folders to which optimizer state or parameters are offloaded, by config key."""
    folders = {}
    for name in _SECTIONS:
        section = f"zero_optimization.{name}"
        if resolved.values.get(f"{section}.device") == "nvme":
            key = f"{section}.nvme_path"
            folders[key] = Path(str(resolved.values[key]))
    return folders


def prepare_nvme(resolved: ResolvedConfig) -> None:
    """Check the folders and build the op of NVMe offload; does nothing without such offload.

    Raises:
        ConfigError: a folder that does not exist or cannot be written, or an op that cannot be
            built.
    """
    folders = nvme_folders(resolved)
    if not folders:
        return
    raise_problems(
        [problem for key, folder in folders.items() for problem in _folder_problems(key, folder)],
        error=ConfigError,
    )
    ops.check_buildable("async_io")
    ops.build_ops(["async_io"])


def _folder_problems(key: str, folder: Path) -> list[Problem]:
    """List a problem if a folder does not exist or cannot be written."""
    remedy = "set nvme_path to an existing folder on a local disk of every machine"
    if not folder.is_dir():
        return [Problem(f"{key}={str(folder)!r}", "there is no such folder here", remedy)]
    try:
        with tempfile.TemporaryFile(dir=folder):
            return []
    except OSError as error:
        return [Problem(f"{key}={str(folder)!r}", f"it cannot be written: {error}", remedy)]
