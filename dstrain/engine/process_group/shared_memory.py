"""Removal of the buffers of DeepSpeed's CPU collectives in ``/dev/shm``, which it leaves there.

Each rank makes a named buffer of 66 MiB, and maps the buffers of all ranks while the process group
comes up. From then on nobody needs the names: mapped memory stays usable, and the system frees it
when the last process has ended, even if that was killed.
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
# Ranks map each other's buffers within seconds of making them; after that no run needs a name.
SETTLED_SECONDS = 300.0
_is_unlinked = False


def unlink_once_mapped() -> None:
    """Remove the name of this rank's buffer once all ranks have mapped it; a collective, once.

    To be called when DeepSpeed has brought up its side of the process group.
    """
    global _is_unlinked
    if not _is_unlinked:
        barrier()
        unlink_rank_buffer()
        _is_unlinked = True


def unlink_rank_buffer() -> None:
    """Remove the name of this rank's buffer, where there is one."""
    variables = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK")]
    name = "_".join([_NAME, str(os.getuid()), *variables])
    with contextlib.suppress(OSError):
        (FOLDER / name).unlink()


def remove_leftovers(folder: Path = FOLDER, *, settled_seconds: float = SETTLED_SECONDS) -> int:
    """Remove buffers of this user's that no process has mapped: their runs were killed.

    A process that cannot be seen (in another container that shares the folder) loses nothing, as
    its ranks have long mapped their buffers.

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
            if now.st_ino == found[name].st_ino:  # else a new run's has taken its place
                os.unlink(name)
                freed += now.st_size
    if freed:
        logger.warning("%d MiB of shared memory that killed runs had left are freed", freed >> 20)
    return freed


def _mapped(names: dict[str, os.stat_result]) -> set[str]:
    """Return the names that some process of this user has mapped."""
    if not names:
        return set()
    mapped: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid != os.getuid():
                continue  # a buffer is readable for its user alone
            maps = (process / "maps").read_text(errors="replace")
        except OSError:
            continue  # it has ended, or hides itself from all others
        mapped |= {name for name in names if name in maps}
    return mapped
