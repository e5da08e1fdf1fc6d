"""The locks of builds: taking turns at one, and removing those that killed builds left behind.

torch's ``load`` guards the folder of each op that it compiles with a file named `lock`. A process
killed while it builds leaves it, after which every later run waits for it for ever:
``clear_stale_locks`` removes the ones that no living process holds. Imports neither torch nor
deepspeed, so that a launcher can clear them in no time.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from dstrain.core.errors import ConfigError, Problem

logger = logging.getLogger(__name__)

# A living owner's lock is not among its open files for a moment after it is made, and for another
# before it is removed. One that is in neither state this long apart is nobody's.
SETTLE_SECONDS = 2.0
# Where the owner may be out of sight only age tells; no op takes this long to build.
UNSEEN_OWNER_SECONDS = 1800.0

# File systems that no other machine can write to.
_LOCAL_FILESYSTEMS = frozenset(
    ["bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"]
)
# A person looking into an op's folder is no builder. (ninja runs its commands through `sh`.)
_INTERACTIVE_SHELLS = frozenset(["bash", "csh", "fish", "ksh", "tcsh", "zsh"])


def clear_stale_locks(folder: Path) -> list[Path]:
    """Remove the build locks under `folder` that belong to no living process; return their paths.

    Safe while other ranks build or clear. torch keeps a lock open for as long as it builds, so one
    that no process has open, on two looks, is nobody's; ninja and compilers that outlived their
    build are waited for. Processes that clear take turns: between that finding and the removal
    nobody else can have removed the lock and a new build put its own in the same place.

    Processes of another user, or of another machine where the disk is shared, cannot be seen: there
    a lock goes only once it is older than `UNSEEN_OWNER_SECONDS`. Containers that share a folder on
    one machine cannot see each other either, and cannot be told apart: give each its own.

    Raises:
        ConfigError: a stale lock cannot be removed.
    """
    if not _locks(folder):
        return []
    cleared = []
    with taking_turns(folder / ".dstrain-clear.lock"):
        for lock in _locks(folder):
            if not _is_stale(lock):
                continue
            try:
                lock.unlink(missing_ok=True)
            except OSError as error:
                raise ConfigError(
                    Problem(
                        f"A killed build of a DeepSpeed op left {lock}, and it cannot be removed",
                        f"every run that needs the op would wait for it for ever ({error})",
                        "remove it, or set TORCH_EXTENSIONS_DIR to a folder of your own",
                    )
                ) from error
            logger.warning("Removed %s, left by a build that was killed.", lock)
            cleared.append(lock)
    return cleared


@contextlib.contextmanager
def taking_turns(path: Path, *, waiting: str = "") -> Iterator[None]:
    """Hold an exclusive lock on `path` for the body; the kernel drops it when the process dies."""
    with contextlib.ExitStack() as stack:
        # Where we cannot write or the file system knows no locks, going on alone is what is left.
        with contextlib.suppress(OSError):
            file = stack.enter_context(open(path, "a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting:
                    print(waiting, file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _locks(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/lock"))


def _is_stale(lock: Path) -> bool:
    first: os.stat_result | None = None
    while True:
        try:
            seen = lock.stat()
        except FileNotFoundError:
            return False
        asked_before = first is not None
        if first is None:
            first = seen
        elif (first.st_ino, first.st_mtime_ns) != (seen.st_ino, seen.st_mtime_ns):
            return False  # a new build took the place of the one that ended
        owned, compiling = _users(lock)
        if owned:
            return False
        age_seconds = time.time() - seen.st_mtime
        if age_seconds >= UNSEEN_OWNER_SECONDS:
            return True
        if _owner_may_be_unseen(lock, seen):
            logger.warning(
                "%s may belong to a build by another user or on another machine. If none is under "
                "way, remove it: every run that needs the op waits for it.",
                lock,
            )
            return False
        if asked_before and not compiling:
            return True
        if compiling and not asked_before:
            logger.warning(
                "Waiting for %s, still at work in %s after its build was killed.",
                " and ".join(compiling),
                lock.parent,
            )
        time.sleep(SETTLE_SECONDS)


def _users(lock: Path) -> tuple[bool, list[str]]:
    """Tell whether a visible process has the lock open, and list the processes at work beside it.

    The latter are ninja and compilers that outlived the process that started them; they hold no
    lock, but a second build at the same time would write the same files.
    """
    owned = False
    compiling: list[str] = []
    try:
        lock_id, folder_id = _file_id(lock), _file_id(lock.parent)
    except FileNotFoundError:
        return owned, compiling
    for process in Path("/proc").glob("[0-9]*"):
        # Processes end while we look, and those of other users are closed to us.
        with contextlib.suppress(OSError):
            command = (process / "comm").read_text().strip()
            if command not in _INTERACTIVE_SHELLS and _file_id(process / "cwd") == folder_id:
                compiling.append(f"{command} (process {process.name})")
        with contextlib.suppress(OSError), os.scandir(process / "fd") as opened:
            for descriptor in opened:
                with contextlib.suppress(OSError):
                    owned = owned or _file_id(descriptor.path) == lock_id
    return owned, compiling


def _file_id(path: Path | str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _owner_may_be_unseen(lock: Path, seen: os.stat_result) -> bool:
    if not Path("/proc/self/fd").exists():
        return True
    if os.geteuid() not in (0, seen.st_uid):
        return True
    return _filesystem(lock) not in _LOCAL_FILESYSTEMS


def _filesystem(path: Path) -> str:
    """Return the type of the file system that holds `path`, such as ext4 or nfs4."""
    resolved = path.resolve()
    best, kind = -1, ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # 36 35 98:0 /root /mount/point rw,noatime shared:1 - ext4 /dev/sda1 rw
        mount, _, filesystem = line.partition(" - ")
        point = Path(mount.split()[4])
        # `>=`: of two mounts in one place the later hides the earlier.
        if resolved.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), filesystem.split()[0]
    return kind
