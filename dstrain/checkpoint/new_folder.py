"""A new folder that the user names, made atomically: whole, or absent, or as it was before."""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from dstrain.checkpoint import folders
from dstrain.checkpoint import manifest as manifests
from dstrain.core.errors import CheckpointError, Problem
from dstrain.core.files import sync_folder, unwritten

_MOST_BYTES = 200  # of a name that more is added to: file systems allow 255


def check_new(folder: Path) -> None:
    """Check that a folder is empty or does not exist, and that it can be made.

    What a checkpoint is read for, which may take long, can then be written.

    Raises:
        CheckpointError: the folder has files, the path is a file, or the system refuses.
    """
    with _told_of(folder):
        try:
            facts = os.stat(folder)
        except FileNotFoundError:
            facts = None
        if facts is not None and not stat.S_ISDIR(facts.st_mode):
            raise CheckpointError(
                Problem(f"{str(folder)!r} is a file", "", "name a folder that does not exist yet")
            )
        if facts is not None and any(folder.iterdir()):
            raise CheckpointError(
                Problem(
                    f"{str(folder)!r} is not empty", "", "name a folder that does not exist yet"
                )
            )
        out = Path(os.path.realpath(folder))
        place = out if _stays(out) else out.parent
        while not os.path.lexists(place):
            place = place.parent
        for name in out.relative_to(place).parts:
            with contextlib.suppress(FileNotFoundError):
                os.lstat(place / name)  # a name that is too long
        probe = _staging_of(out, place)
        probe.mkdir()
        probe.rmdir()


@contextlib.contextmanager
def filled_atomically(out: Path) -> Iterator[Path]:
    """Make a hidden folder to fill in the body, and rename it to ``out`` if the body succeeds.

    Raises:
        CheckpointError: the folder cannot be made or written; the error names ``out``.
    """
    given, out = out, Path(os.path.realpath(out))
    with contextlib.ExitStack() as stack:
        with _told_of(given):
            out.parent.mkdir(parents=True, exist_ok=True)
            stays = _stays(out)
            staging = _staging_of(out, out if stays else out.parent)
            staging.mkdir()
        stack.callback(folders.discard_if_there, staging)
        with _told_of(given, of=staging), folders.holding(staging):
            yield staging
        with _told_of(given):
            (staging / folders.LOCK).unlink(missing_ok=True)
            for path, _, _ in os.walk(staging, topdown=False):
                sync_folder(Path(path))
            if stays:
                _move_content(staging, out)
            else:
                os.rename(staging, out)  # over an empty folder; refused over one with content
            sync_folder(out if stays else out.parent)


def _stays(out: Path) -> bool:
    """Tell whether a folder cannot be replaced, and so is filled in place: a mount, or ``.``."""
    return out.exists() and (os.path.ismount(out) or out == Path.cwd())


def _staging_of(out: Path, place: Path) -> Path:
    """Return a new name in ``place`` under which ``out`` is written.

    For an ``out`` named checkpoint-N, ``recover`` knows the name as one that a killed writer left.
    A very long name is shortened, as with what is added to it the system would refuse it.
    """
    name = os.fsdecode(os.fsencode(out.name)[:_MOST_BYTES])
    return place / f".{name}.writing-{uuid.uuid4().hex[:8]}"


@contextlib.contextmanager
def _told_of(out: Path, *, of: Path | None = None) -> Iterator[None]:
    """Turn an OSError of the body, which writes ``out``, into an error that names it.

    Args:
        out: the folder as the user named it.
        of: the folder in which the body writes, where it reads other files too: errors about
            those are left as they are.

    Raises:
        CheckpointError: in place of the OSError.
    """
    try:
        yield
    except OSError as error:
        name = error.filename
        if of is not None and name is not None and not Path(os.fsdecode(name)).is_relative_to(of):
            raise
        raise CheckpointError(unwritten(f"{str(out)!r} cannot be written", out, error)) from error


def _move_content(staging: Path, out: Path) -> None:
    """Move the content of a staging folder into its parent, a manifest last; remove the folder."""
    for path in sorted(staging.iterdir(), key=lambda p: p.name == manifests.NAME):
        os.rename(path, out / path.name)
    staging.rmdir()
