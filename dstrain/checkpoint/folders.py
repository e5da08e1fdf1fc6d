"""Checkpoint folders of a run: naming, finding, committing, rotating and removing them.

A checkpoint is written under a hidden name and is renamed to `checkpoint-N` once its manifest is on
the disk. Even if a process is killed at any point, `checkpoint-N` is a whole checkpoint or absent.

A run's folder belongs to the user. Only folders that dstrain has made are removed, renamed or
replaced in it: a hidden folder with dstrain's naming and content, or a folder that passes
`manifest.is_dstrain_checkpoint`. Symbolic links are the user's and are left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dstrain.checkpoint import manifest as manifests
from dstrain.core.errors import CheckpointError, Problem
from dstrain.core.files import sync_folder
from dstrain.core.log import get_logger

logger = get_logger(__name__)

_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,18})")
_STAGED = re.compile(r"\.checkpoint-[0-9]+\.(writing|replaced|removing)-[0-9a-f]{8}")
_REPLACED = re.compile(r"\.checkpoint-([0-9]+)\.replaced-[0-9a-f]{8}")
STATE = "state"
LOCK = ".lock"


@dataclass(frozen=True)
class Found:
    """Checkpoint folder, with the step in its name."""

    step: int
    folder: Path


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Return the path of a step's checkpoint."""
    return output_dir / f"checkpoint-{step}"


def step_of(name: str) -> int | None:
    """Return the step in the name that ``checkpoint_path`` gives; None for any other name."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1])


def named(output_dir: Path) -> list[Found]:
    """List the folders that have a checkpoint's name, with any content, lowest step first."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in output_dir.iterdir():
            step = step_of(path.name)
            if step is not None and path.is_dir():
                found.append(Found(step, path))
    return sorted(found, key=lambda f: f.step)


def committed(output_dir: Path) -> list[Found]:
    """List the committed checkpoints of a run by step, lowest first, not by unreliable file times.

    A folder counts as committed when it has a manifest.
    """
    return [f for f in named(output_dir) if (f.folder / manifests.NAME).is_file()]


def owned(output_dir: Path) -> list[Found]:
    """List the committed checkpoints that dstrain has made and may remove; no symbolic links."""
    return [f for f in committed(output_dir) if manifests.is_dstrain_checkpoint(f.folder)]


def new_staging(output_dir: Path, step: int) -> Path:
    """Make the staging folder of a step's checkpoint, under a unique hidden name.

    Raises:
        OSError: the folder cannot be made.
    """
    folder = output_dir / f".checkpoint-{step}.writing-{uuid.uuid4().hex[:8]}"
    (folder / STATE).mkdir(parents=True)
    return folder


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Lock a folder during the body, so that other dstrain processes do not remove it.

    The kernel releases the lock when the process dies, so that no lock of a killed run stays. Where
    the file system has no locks, this does nothing.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path = _lock_file(folder)
            mode = "rb" if path.name == manifests.NAME else "ab"
            file = stack.enter_context(open(path, mode))
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def _lock_file(folder: Path) -> Path:
    """Return the file on which a folder is locked: its manifest if it has one, else ``LOCK``.

    A committed folder may be read-only, so it gets no new file.
    """
    committed_manifest = folder / manifests.NAME
    return committed_manifest if committed_manifest.exists() else folder / LOCK


def _is_held(folder: Path, *, if_unknown: bool) -> bool:
    """Tell whether a living process has locked the folder; ``if_unknown`` without file locks."""
    try:
        with open(_lock_file(folder), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return if_unknown
    return False


def commit(staging: Path, output_dir: Path, step: int) -> Path:
    """Rename a fully written staging folder, manifest included, to ``checkpoint-<step>``.

    A checkpoint of the same step from an earlier run is replaced; until the rename is done, the old
    checkpoint stays under a name that ``recover`` restores. Anything else at this path is not
    dstrain's to remove: the new checkpoint then gets a name beside it.

    Raises:
        OSError: renaming failed.
        CheckpointError: the path is taken; the message has the name of the new checkpoint.
    """
    target = checkpoint_path(output_dir, step)
    (staging / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (staging / STATE).rmdir()  # succeeds only where it is empty
    if (staging / STATE).exists():
        sync_folder(staging / STATE)
    sync_folder(staging)
    old = None
    if os.path.lexists(target):
        if not manifests.is_dstrain_checkpoint(target):
            raise _taken(target, _kept_beside(staging, target))
        old = output_dir / f".checkpoint-{step}.replaced-{uuid.uuid4().hex[:8]}"
        os.rename(target, old)
    os.rename(staging, target)
    sync_folder(output_dir)
    if old is not None:
        _remove(old)
    return target


def _kept_beside(staging: Path, target: Path) -> Path:
    """Rename a finished checkpoint to a name that dstrain never removes."""
    kept = target.parent / f"{target.name}.kept-{uuid.uuid4().hex[:8]}"
    os.rename(staging, kept)
    sync_folder(kept.parent)
    return kept


def _taken(target: Path, kept: Path) -> CheckpointError:
    return CheckpointError(
        Problem(
            f"{target} is no checkpoint of dstrain's, and is left as it is",
            f"{_what_is_at(target)}; the checkpoint of this step is whole, in {kept}",
            f"move {target} away; {kept} can be resumed from by its name, or renamed to "
            f"{target.name}",
        )
    )


def _what_is_at(path: Path) -> str:
    if path.is_symlink():
        return "it is a symbolic link"
    if not path.is_dir():
        return "it is a file"
    has = (path / manifests.NAME).exists()
    return f"it has {'another program' + chr(39) + 's' if has else 'no'} {manifests.NAME}"


def discard_if_there(staging: Path) -> None:
    """Remove a staging folder if it still exists: after a commit it has another name."""
    if staging.exists():
        _remove(staging)


def recover(output_dir: Path) -> None:
    """Clean up after killed runs: restore checkpoints being replaced, remove unfinished folders.

    Folders that a living process writes are left alone. Folders with such a name that dstrain has
    not made are left alone with a warning, as no checkpoint of that step can be saved there.
    """
    if not output_dir.is_dir():
        return
    for path in sorted(output_dir.iterdir()):
        replaced = _REPLACED.fullmatch(path.name)
        if _STAGED.fullmatch(path.name) and path.is_dir() and not _has_our_content(path):
            logger.warning(
                "%s is left as it is: it has files, and none by which dstrain knows what a killed "
                "run has left; move it away, or remove it",
                path,
            )
        elif (
            replaced
            and manifests.is_dstrain_checkpoint(path)
            and not os.path.lexists(checkpoint_path(output_dir, int(replaced[1])))
        ):
            try:
                os.rename(path, checkpoint_path(output_dir, int(replaced[1])))
            except OSError as error:
                logger.warning("%s could not be put back: %s", path, error)
            else:
                logger.warning("%s is put back: its replacement was never finished", path)
        elif _is_leftover(path) and not _is_held(path, if_unknown=True):
            logger.warning("%s is removed: a run was killed while it worked on it", path)
            _remove(path)
        elif step_of(path.name) is not None and not manifests.is_dstrain_checkpoint(path):
            logger.warning(
                "%s is no checkpoint of dstrain's (%s): it is left as it is, and a checkpoint of "
                "that step would be kept beside it",
                path,
                _what_is_at(path),
            )


def _is_leftover(path: Path) -> bool:
    """Tell whether a path is a hidden folder, or a link renamed by an older dstrain, to remove."""
    return bool(_STAGED.fullmatch(path.name)) and (path.is_dir() or path.is_symlink())


def _has_our_content(folder: Path) -> bool:
    """Tell whether a folder with a hidden name is empty or has files that dstrain writes there.

    A save begins with an empty `state` and a lock file; the removal of a checkpoint ends with its
    manifest.
    """
    if folder.is_symlink() or manifests.is_dstrain_checkpoint(folder):
        return True
    staged = _STAGED.fullmatch(folder.name)
    marks = {STATE, LOCK} if staged is not None and staged[1] == "writing" else set()
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError:
        return False
    return not names or not marks.isdisjoint(names)


def rotate(output_dir: Path, *, limit: int | None, keep: list[Path]) -> list[Path]:
    """Remove the oldest committed checkpoints until ``limit`` are left; return the removed ones.

    The newest, those in ``keep`` (the best one) and those that a process reads are never removed;
    the best counts towards the limit, as documented by transformers.
    """
    if not limit or limit < 0:
        return []
    removed = []
    for old in surplus(output_dir, limit=limit, keep=keep):
        if is_read(old.folder):
            logger.warning("%s is kept beyond save_total_limit: it is being read", old.folder)
        elif remove(old):
            removed.append(old.folder)
    return removed


def surplus(output_dir: Path, *, limit: int, keep: list[Path]) -> list[Found]:
    """List the oldest committed checkpoints beyond ``limit``; never the newest or one in ``keep``.

    Only folders that dstrain has made count towards the limit; links do not, and are never removed.
    """
    found = owned(output_dir)
    protected = {path.resolve() for path in keep}
    removable = [f for f in found[:-1] if f.folder.resolve() not in protected]
    return removable[: max(0, len(found) - limit)]


def is_read(folder: Path) -> bool:
    """Tell whether a living process reads (has locked) a committed checkpoint."""
    return _is_held(folder, if_unknown=False)


def remove(checkpoint: Found) -> bool:
    """Rename a committed checkpoint to a hidden name, so that it no longer counts, and remove it.

    Returns:
        False where the folder is not dstrain's or the system refused, which is logged.
    """
    folder = checkpoint.folder
    if not manifests.is_dstrain_checkpoint(folder):
        logger.warning("%s is left as it is: it is no checkpoint of dstrain's", folder)
        return False
    hidden = folder.parent / f".checkpoint-{checkpoint.step}.removing-{uuid.uuid4().hex[:8]}"
    try:
        os.rename(folder, hidden)
    except OSError as error:
        logger.warning("%s could not be removed: %s", folder, error)
        return False
    _remove(hidden)
    return True


def _remove(folder: Path) -> None:
    """Remove a folder with one of dstrain's hidden names; for a symbolic link, only the link."""
    try:
        if folder.is_symlink():
            folder.unlink()
        else:
            _remove_content(folder)
            folder.rmdir()
    except OSError as error:
        logger.warning("%s could not be removed whole: %s", folder, error)


def _remove_content(folder: Path) -> None:
    """Empty a folder; remove last the files by which ``recover`` recognises a leftover."""
    last = (STATE, LOCK, manifests.NAME)
    for path in sorted(folder.iterdir(), key=lambda p: (p.name in last, p.name == manifests.NAME)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
