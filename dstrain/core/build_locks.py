"""Locks around builds of DeepSpeed's ops: waiting for them, and removing stale ones.

torch's ``load`` guards the folder of each op that it compiles with a file named `lock`. A process
killed during a build leaves that file behind, and every later run would wait for it for ever:
``clear_stale_locks`` removes the locks that no living process holds, and does not wait for builds.
A run waits for a build only when it needs that op, in ``wait_for_build``, which prints the process
that builds and has a time limit. Imports neither torch nor deepspeed, so that a launcher can clear
locks in no time.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from dstrain.core.errors import ConfigError, Problem

logger = logging.getLogger(__name__)

# A living owner does not yet have the lock open for a moment after it made the file, and no longer
# for a moment before it removes it. A lock that nobody has open in two checks this far apart is
# stale.
SETTLE_SECONDS = 2.0
# Where the owner's process may be invisible to us, only the lock's age counts; no op takes this
# long to build.
UNSEEN_OWNER_SECONDS = 1800.0
# Limits of waiting: for one op's build, and for a process that may build several ops in its turn.
WAIT_SECONDS = 1800.0
TURN_SECONDS = 3600.0
_LOOK_SECONDS = 5.0
_REMIND_SECONDS = 60.0
_TRY_SECONDS = 0.1

# File systems that no other machine can write to.
_LOCAL_FILESYSTEMS = frozenset(
    ["bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"]
)
# A shell whose working directory is an op's folder belongs to a person, not to a build. (ninja
# runs its commands through `sh`, which is not listed.)
_INTERACTIVE_SHELLS = frozenset(["bash", "csh", "fish", "ksh", "tcsh", "zsh"])


def clear_stale_locks(folder: Path) -> list[Path]:
    """Remove the build locks under `folder` that belong to no living process; return their paths.

    Safe while other ranks build or clear. torch keeps a lock open for as long as it builds, so a
    lock that no process has open in two checks is stale. A lock stays, with a warning, while ninja
    or compilers of a killed build still work in its folder: a run that needs the op waits for them
    in `wait_for_build`. Processes that clear locks take turns: between check and removal no other
    process can remove the lock, and so no new build can put its own lock in the same place.

    Processes of another user, or of another machine where the disk is shared, are invisible: such a
    lock is removed only once it is older than `UNSEEN_OWNER_SECONDS`. Containers that share a
    folder on one machine cannot see each other either, and this cannot be detected: give each
    container its own folder.

    A lock that cannot be removed causes only a warning: this run may not need the op.

    Does nothing where torch locks with the kernel's file locks, which end with their process.
    """
    cleared: list[Path] = []
    if not torch_leaves_locks():
        return cleared
    locks = [lock for lock in _locks(folder) if _may_be_stale(lock, says=True) is not None]
    try:
        _clear(folder, locks, cleared)
    except ConfigError as error:
        logger.warning("%s", error)
    return cleared


@functools.cache
def torch_leaves_locks() -> bool:
    """Tell whether the installed torch guards builds by lock files that a killed process leaves.

    Releases from 2.15 on lock an open file in the kernel instead; their lock files stay and mean
    nothing. Reads torch's source and does not import torch.
    """
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return True
    code = Path(torch.origin).parent / "utils" / "cpp_extension.py"
    return not code.is_file() or "FileBaton" in code.read_text(encoding="utf-8")


def wait_for_build(lock: Path) -> bool:
    """Wait until the build behind a lock has ended; print on standard error which process builds.

    Returns:
        True when the owner has released the lock; False when the owner was killed and this call
        has removed the lock, so that the op is still to be built.

    Raises:
        ConfigError: the build has not ended after `WAIT_SECONDS`, or a stale lock cannot be
            removed.
    """
    op, folder = lock.parent.name, lock.parent
    started, said, looked = time.monotonic(), None, -_LOOK_SECONDS
    while lock.exists():
        waited = time.monotonic() - started
        if waited - looked >= _LOOK_SECONDS:
            looked = waited
            cleared: list[Path] = []
            if _may_be_stale(lock) is not None:
                _clear(folder.parent, [lock], cleared)
            if cleared:
                return False
            owners, compiling = _users(lock)
            who = " and ".join(owners or compiling) or "a process that cannot be seen from here"
            how = "builds it" if owners or not compiling else "goes on after its build was killed"
            if waited > WAIT_SECONDS:
                raise ConfigError(_not_built(lock, who, waited))
            if lock.exists() and (said is None or waited - said >= _REMIND_SECONDS):
                said = waited
                _print_to_stderr(
                    f"Waiting for DeepSpeed's {op}: {who} {how} in {folder} ({waited:.0f} s) ..."
                )
        time.sleep(_TRY_SECONDS)
    return True


def _not_built(lock: Path, who: str, waited: float) -> Problem:
    return Problem(
        f"DeepSpeed's {lock.parent.name} is not built after waiting {waited:.0f} s for {who}",
        f"it works in {lock.parent}, of which {lock} keeps others out; no op takes this long",
        f"end that process (kill its number) and start again; where it runs no more, remove {lock}"
        "; or set TORCH_EXTENSIONS_DIR to a folder of your own",
    )


def _clear(folder: Path, locks: Sequence[Path], cleared: list[Path]) -> None:
    """Remove the stale ones among `locks` in an extensions folder; append them to `cleared`."""
    if not locks:
        return
    with taking_turns(folder / ".dstrain-clear.lock", limit_seconds=_most_seconds(locks)):
        for lock in _stale(locks):
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


def _most_seconds(locks: Sequence[Path]) -> float:
    """Return the longest wait for other ranks to clear locks: each may check all of them."""
    return 60.0 + SETTLE_SECONDS * (os.cpu_count() or 1) + len(locks)


@contextlib.contextmanager
def taking_turns(
    path: Path, *, waiting: str = "", limit_seconds: float = TURN_SECONDS
) -> Iterator[None]:
    """Hold an exclusive lock on `path` for the body; the kernel drops it when the process dies.

    The file contains the number of the process that holds the lock or held it last.

    Args:
        path: path of the lock file, which is not removed.
        waiting: line to print when another process holds the lock; "" for the default line.
        limit_seconds: longest wait for other processes.

    Raises:
        ConfigError: another process still holds the lock after this time.
    """
    with contextlib.ExitStack() as stack:
        # Without the right to write or without locks in the file system, go on unlocked.
        with contextlib.suppress(OSError):
            file = stack.enter_context(open(path, "a"))
            _take(file.fileno(), path, waiting, limit_seconds)
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        yield


def _take(descriptor: int, path: Path, waiting: str, limit_seconds: float) -> None:
    started, said = time.monotonic(), 0.0
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited = time.monotonic() - started
        holder = _holder(path)
        if waited > limit_seconds:
            raise ConfigError(
                Problem(
                    f"{holder} has kept {path} for {waited:.0f} s",
                    "processes that build or clear DeepSpeed's ops in a folder take turns, and "
                    "none takes this long",
                    f"see what {holder} does and end it (kill), or set TORCH_EXTENSIONS_DIR to a "
                    "folder of your own",
                )
            )
        if (waiting and not said) or waited - said >= _REMIND_SECONDS:
            said = max(waited, _TRY_SECONDS)
            _print_to_stderr(
                waiting or f"Waiting for {holder}, which has {path} ({waited:.0f} s) ..."
            )
        time.sleep(_TRY_SECONDS)


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        if number := path.read_text().strip():
            return f"process {number}"
    return "another process"


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _locks(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/lock"))


def _stale(locks: Sequence[Path]) -> list[Path]:
    """Return the locks without an owner in two checks, with one pause between for all of them."""
    first = {lock: seen for lock in locks if (seen := _may_be_stale(lock)) is not None}
    if first:
        time.sleep(SETTLE_SECONDS)
    found = []
    for lock, seen in first.items():
        again = _may_be_stale(lock)
        # A new build may have made a lock of the same name meanwhile.
        if again is not None and _identity(again) == _identity(seen):
            found.append(lock)
    return found


def _identity(seen: os.stat_result) -> tuple[int, int]:
    return seen.st_ino, seen.st_mtime_ns


def _may_be_stale(lock: Path, *, says: bool = False) -> os.stat_result | None:
    """Return the `stat` of a lock that has no owner in one check; None when it has one.

    Args:
        lock: the lock file.
        says: log a warning when the lock stays although no owner is visible.
    """
    try:
        seen = lock.stat()
    except FileNotFoundError:
        return None
    owners, compiling = _users(lock)
    if owners:
        return None
    if compiling:
        if says:
            logger.warning(
                "%s still at work in %s after its build was killed: a run that needs this op "
                "waits for it. To build it anew at once, end that process.",
                " and ".join(compiling),
                lock.parent,
            )
        return None
    if time.time() - seen.st_mtime < UNSEEN_OWNER_SECONDS and _owner_may_be_unseen(lock, seen):
        if says:
            logger.warning(
                "%s may belong to a build by another user or on another machine. If none is under "
                "way, remove it: every run that needs the op waits for it.",
                lock,
            )
        return None
    return seen


def _users(lock: Path) -> tuple[list[str], list[str]]:
    """List the visible processes that have the lock open, and those working in its folder.

    The second list has ninja and compilers that outlived the process that started them; they hold
    no lock, but a second build at the same time would write the same files.
    """
    owners: list[str] = []
    compiling: list[str] = []
    try:
        lock_id, folder_id = _file_id(lock), _file_id(lock.parent)
    except FileNotFoundError:
        return owners, compiling
    for process in Path("/proc").glob("[0-9]*"):
        # A process may end while we read it, and another user's cannot be read.
        command = ""
        with contextlib.suppress(OSError):
            command = (process / "comm").read_text().strip()
            if command not in _INTERACTIVE_SHELLS and _file_id(process / "cwd") == folder_id:
                compiling.append(f"{command} (process {process.name})")
        with contextlib.suppress(OSError), os.scandir(process / "fd") as opened:
            for descriptor in opened:
                with contextlib.suppress(OSError):
                    if _file_id(descriptor.path) == lock_id:
                        owners.append(f"{command} (process {process.name})")
                        break
    return owners, compiling


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
        # `>=`: a later mount at the same point hides the earlier one.
        if resolved.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), filesystem.split()[0]
    return kind
