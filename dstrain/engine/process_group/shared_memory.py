"""Removal of the files that DeepSpeed's CPU collectives leave in ``/dev/shm``.

Each rank creates a file of 66 MiB as a buffer, and maps the files of all ranks while the process
group starts. After that the names are not needed: mapped memory stays usable, and the system frees
it when the last process that maps it has ended, even if it was killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

from dstrain.core.log import get_logger
from dstrain.core.ranks import barrier

logger = get_logger(__name__)

FOLDER = Path("/dev/shm")
_NAME = "deepspeed_allreduce_buffer"
# Ranks map each other's files within seconds of creating them; older names are not needed.
SETTLED_SECONDS = 300.0
_is_unlinked = False


def unlink_once_mapped() -> None:
    """Remove this rank's file after all ranks have mapped it; a collective of all ranks.

    To be called when DeepSpeed has initialised its collectives. Only the first call does anything.
    """
    global _is_unlinked
    if not _is_unlinked:
        barrier()
        unlink_rank_buffer()
        _is_unlinked = True


def unlink_rank_buffer() -> None:
    """Remove this rank's file, if it exists."""
    variables = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK")]
    name = "_".join([_NAME, str(os.getuid()), *variables])
    with contextlib.suppress(OSError):
        (FOLDER / name).unlink()


def remove_leftovers(folder: Path = FOLDER, *, settled_seconds: float = SETTLED_SECONDS) -> int:
    """Remove this user's files that no process maps, which killed runs have left.

    Processes in another container that shares the folder are not visible here. They lose nothing,
    since only files that are older than ``settled_seconds`` are removed: they have mapped these.

    Args:
        folder: where the files are.
        settled_seconds: age that a file must have.

    Returns:
        the number of bytes that were freed.
    """
    user = os.getuid()
    ours = re.compile(rf"{_NAME}_{user}_.+_[0-9]+_[0-9]+")
    found: dict[str, os.stat_result] = {}
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if not ours.fullmatch(path.name):
                continue
            with contextlib.suppress(OSError):
                seen = path.lstat()
                age_seconds = time.time() - max(seen.st_mtime, seen.st_ctime)
                if seen.st_uid == user and age_seconds >= settled_seconds and not path.is_symlink():
                    found[str(path)] = seen
    freed = 0
    for name in sorted(set(found) - _mapped(found)):
        with contextlib.suppress(OSError):
            now = os.lstat(name)
            if now.st_ino == found[name].st_ino:  # else a new run has created its file meanwhile
                os.unlink(name)
                freed += now.st_size
    if freed:
        logger.warning("%d MiB of shared memory that killed runs had left are freed", freed >> 20)
    return freed


def _mapped(names: dict[str, os.stat_result]) -> set[str]:
    """Return the files that some process of this user maps."""
    if not names:
        return set()
    mapped: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid != os.getuid():
                continue  # no other user may read the file
            maps = (process / "maps").read_text(errors="replace")
        except OSError:
            continue  # the process has ended, or may not be inspected
        mapped |= {name for name in names if name in maps}
    return mapped
