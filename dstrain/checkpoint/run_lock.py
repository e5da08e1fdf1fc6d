"""Lock of a run on its output folder, so that two runs do not replace each other's files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dstrain.core.errors import CheckpointError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import all_or_none

logger = get_logger(__name__)

RUN_LOCK = ".dstrain-run.lock"
_CANNOT_BE_WRITTEN = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS)
_SHARED = "; if it is this one on another machine, they share the disk: leave save_on_each_node out"


class RunLock:
    """Re-entrant lock of a process on a folder.

    The kernel releases it when the process dies. The lock file is empty, and is removed when the
    run has ended. Where the folder cannot be written, or the file system has no locks, this does
    nothing. Anything else under that name is the user's: it is neither followed nor removed.

    Attributes:
        folder: the run's output folder.
    """

    def __init__(self, folder: Path, *, on_each_node: bool = False) -> None:
        """Set up without taking the lock.

        Args:
            folder: output folder of the run.
            on_each_node: whether every machine of this run locks a folder on its own disk.
        """
        self.folder = Path(folder)
        self._on_each_node = on_each_node
        self._file: BinaryIO | None = None
        self._of_folder: tuple[int, int] | None = None
        self._times = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock during the body; nested uses share it.

        Raises:
            CheckpointError: another living process holds the lock, or its file cannot be made.
        """
        if not self._times:
            self._take()
        self._times += 1
        try:
            yield
        finally:
            self._times -= 1
            if not self._times:
                self._release()

    def keep(self) -> bool:
        """Check that the folder still exists and is locked by this run; make it anew if it is gone.

        A folder that was moved or removed during the run is made anew at the same path, with an
        error in the log; the run goes on and saves into the new folder.

        Returns:
            True if the folder was moved or removed.

        Raises:
            CheckpointError: another run has locked the new folder, or it cannot be made.
        """
        if self._file is None or self._is_in_place():
            return False
        gone = _id_of(self.folder) != self._of_folder
        moved = self._moved_to()
        self._file.close()
        self._file = None
        if gone:
            logger.error(
                "%s was %s while the run was writing into it: it is made anew, and what is saved "
                "from now on is there",
                self.folder,
                f"moved to {moved}" if moved else "removed",
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                Problem(
                    f"output_dir {str(self.folder)!r} is gone, and cannot be made anew",
                    error.strerror or str(error),
                    f"it was moved to {moved}" if moved else "give the run a folder that stays",
                )
            ) from error
        self._take()
        return gone

    def _take(self) -> None:
        while True:
            file = self._opened()
            if file is None:
                return
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.close()
                raise CheckpointError(
                    Problem(
                        f"another run is writing into {str(self.folder)!r}",
                        "two runs would replace and remove each other's files",
                        "choose another output_dir, or wait until that run has ended"
                        + (_SHARED if self._on_each_node else ""),
                    )
                ) from error
            except OSError:
                file.close()  # a file system without locks
                return
            self._file, self._of_folder = file, _id_of(self.folder)
            if self._is_in_place():
                return
            file.close()  # a run that ended has removed it meanwhile
            self._file = None

    def _opened(self) -> BinaryIO | None:
        """Open or create the lock file; return None where the folder cannot be written.

        Raises:
            CheckpointError: the name is taken by something else than a file, or opening fails.
        """
        path = self.folder / RUN_LOCK
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            if _is_something_else(path):
                raise _taken(path) from error
            if error.errno in _CANNOT_BE_WRITTEN:
                return None
            raise CheckpointError(
                Problem(
                    f"{path}, which keeps other runs out of the folder, cannot be opened",
                    error.strerror or str(error),
                    "see to the disk, or choose another output_dir",
                )
            ) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise _taken(path)
        return open(descriptor, "ab")

    def _release(self) -> None:
        if self._file is None:
            return
        if self._is_in_place() and not os.fstat(self._file.fileno()).st_size:
            with contextlib.suppress(OSError):
                (self.folder / RUN_LOCK).unlink()
        self._file.close()
        self._file = None

    def _is_in_place(self) -> bool:
        """Tell whether the lock file in the folder is the file that this process holds."""
        assert self._file is not None
        facts = os.fstat(self._file.fileno())
        path = self.folder / RUN_LOCK
        return _id_of(path) == (facts.st_dev, facts.st_ino) and not path.is_symlink()

    def _moved_to(self) -> str:
        """Return the present path of a moved folder by ``/proc``; "" if the folder was removed."""
        assert self._file is not None
        with contextlib.suppress(OSError):
            path = Path(os.readlink(f"/proc/self/fd/{self._file.fileno()}"))
            if path.name == RUN_LOCK and path.exists():
                return str(path.parent)
        return ""


@contextlib.contextmanager
def held_lock(lock: RunLock, *, takes: bool) -> Iterator[None]:
    """Hold a lock during the body, on the ranks with ``takes``; a collective of all ranks.

    Raises:
        CheckpointError: another run holds the lock of some rank; raised on every rank.
    """
    with contextlib.ExitStack() as stack:
        with all_or_none():
            if takes:
                stack.enter_context(lock.held())
        yield


def _is_something_else(path: Path) -> bool:
    """Tell whether a path exists and is not a regular file."""
    try:
        return not stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _taken(path: Path) -> CheckpointError:
    kind = "symbolic link" if path.is_symlink() else "folder" if path.is_dir() else "special file"
    return CheckpointError(
        Problem(
            f"{path} is a {kind}, and is left as it is",
            "a run keeps other runs out of its folder by an empty file of this name",
            "move it away, or choose another output_dir",
        )
    )


def _id_of(path: Path) -> tuple[int, int] | None:
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino
