"""Crash-safe writing of files: checksums while writing, fsync before a file counts as written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import xxhash
from pydantic import StringConstraints

from dstrain.core.documents import Count
from dstrain.core.errors import DstrainError, Problem, TrainingError

_CHUNK_BYTES = 16 * 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum that a file must have to count as unchanged.

    Attributes:
        size: size in bytes.
        checksum: "xxh3:" and the 64-bit XXH3 hash of the content in hexadecimal.
    """

    size: Count
    checksum: Annotated[str, StringConstraints(strict=True, pattern="^xxh3:[0-9a-f]{16}$")]


class DurableFile:
    """A new file, written sequentially, that is on the disk once ``close`` has returned."""

    def __init__(self, path: Path) -> None:
        """Create or truncate ``path``."""
        self._file: BinaryIO = open(path, "wb", buffering=0)  # noqa: SIM115 - see close
        self._hash = xxhash.xxh3_64()
        self._size = 0

    def write(self, data: Any) -> None:
        """Append bytes or any buffer, in chunks and without a copy."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK_BYTES):
            chunk = view[start : start + _CHUNK_BYTES]
            self._hash.update(chunk)
            while chunk:
                written = self._file.write(chunk)
                self._size += written
                chunk = chunk[written:]

    def close(self) -> FileRecord:
        """Wait until the content is on the disk, close the file, return its size and checksum."""
        with self._file:
            os.fsync(self._file.fileno())
        return FileRecord(self._size, f"xxh3:{self._hash.hexdigest()}")

    def abandon(self) -> None:
        """Close the file after a failure, without waiting for the disk."""
        self._file.close()


def write_bytes(path: Path, content: bytes) -> FileRecord:
    """Write a whole file, wait until it is on the disk, and return its size and checksum.

    Raises:
        OSError: the disk is full, the folder is gone, and so on.
    """
    file = DurableFile(path)
    try:
        file.write(content)
        return file.close()
    except BaseException:
        file.abandon()
        raise


def write_json(path: Path, content: Any) -> FileRecord:
    """Write JSON with ``write_bytes``; refuse NaN and infinities, which most readers refuse."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    return write_bytes(path, text.encode())


def write_record(path: Path, text: str) -> None:
    """Write a text file for people in place of an older file, which stays if the write fails.

    Raises:
        TrainingError: the disk is full, the folder is gone, and so on.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the body, which writes a file of the run, into an error for users.

    Raises:
        TrainingError: the body raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(unwritten(f"{path} cannot be written", path, error)) from error


@contextlib.contextmanager
def told_refused(kind: type[DstrainError]) -> Iterator[None]:
    """Turn a PermissionError of the body into an error for users; also usable as a decorator.

    In a folder that may not be entered, even the check whether a path exists is refused.

    Args:
        kind: the class of error to raise.

    Raises:
        DstrainError: the body raised a PermissionError.
    """
    try:
        yield
    except PermissionError as error:
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else "a file"
        raise kind(
            Problem(
                f"{name} cannot be used",
                f"{error.strerror or error}",
                "change the permissions of it and of the folders it is in, or name another",
            )
        ) from error


def unwritten(what: str, path: Path, error: OSError, *, remedy: str = "") -> Problem:
    """Describe a failed write as a problem, with the free bytes where the disk is full.

    Args:
        what: the failure in words, such as "the log cannot be written".
        path: the file or folder to be written.
        error: the error of the system.
        remedy: what to change where the disk is not full; "" for the usual advice.
    """
    why = error.strerror or str(error)
    if error.errno in _FULL or "No space left" in why:
        left = free_bytes(path)
        room = "" if left is None else f"; {left:,} bytes are free on the disk of {path}"
        return Problem(what, f"{why}{room}", "free space there, or write to another disk")
    why = _obstacle(path) or why
    return Problem(what, why, remedy or "name another folder, or change its permissions")


def _obstacle(path: Path) -> str:
    """Say what in a path is a link that leads nowhere, or a file that should be a folder.

    The system says only "File exists" of such a link, and "Not a directory" without its name.

    Returns:
        "" where there is neither.
    """
    for place in (path, *path.absolute().parents):
        if os.path.islink(place) and not os.path.exists(place):
            return f"{place} is a link that leads nowhere: to {os.readlink(place)!r}"
        if place != path and os.path.isfile(place):
            return f"{place} is a file, not a folder"
    return ""


def check_utf8(what: str, path: str | os.PathLike[str] | None) -> list[Problem]:
    """List a problem where a path is no UTF-8, as a Linux name need not be.

    Libraries in Rust and C++ (safetensors, tokenizers, TensorBoard's) take no other path.

    Args:
        what: says what the path is of, such as "output_dir".
        path: to be written or read by these libraries; None for none.
    """
    try:
        os.fspath(path or "").encode()
    except UnicodeEncodeError:
        return [
            Problem(
                f"{what}={os.fspath(path or '')!r}",
                "its name is not valid UTF-8, and the libraries for model files take no other",
                "rename it, or name another; what is in it stays as it is",
            )
        ]
    return []


def free_bytes(path: Path) -> int | None:
    """Return the bytes that can still be written to the disk of ``path``, or None when unknown.

    The path need not exist; its nearest existing parent is used.
    """
    for place in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            facts = os.statvfs(place)
            return facts.f_bavail * facts.f_frsize
    return None


def record_of(path: Path) -> FileRecord:
    """Read a whole file and return its size and checksum."""
    digest, size = xxhash.xxh3_64(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, f"xxh3:{digest.hexdigest()}")


def make_durable(path: Path) -> FileRecord:
    """Flush a file written by a library to the disk; return its size and checksum."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return record_of(path)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (the names of its files) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with a leading ``~`` or ``~user`` replaced; unchanged for an unknown user."""
    return Path(os.path.expanduser(path))
