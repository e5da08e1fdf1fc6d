"""Files that survive a crash: checksummed while they are written, on the disk before they count."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import xxhash
from pydantic import StringConstraints

from dstrain.core.documents import Count

_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class FileRecord:
    """What a file must be to count as unchanged.

    Attributes:
        size: in bytes.
        checksum: "xxh3:" and the 64-bit XXH3 hash of the content in hexadecimal.
    """

    size: Count
    checksum: Annotated[str, StringConstraints(strict=True, pattern="^xxh3:[0-9a-f]{16}$")]


class DurableFile:
    """A new file, written from start to end, that is on the disk once ``close`` has returned."""

    def __init__(self, path: Path) -> None:
        """Create or truncate ``path``."""
        self._file: BinaryIO = open(path, "wb", buffering=0)  # noqa: SIM115 - see close
        self._hash = xxhash.xxh3_64()
        self._size = 0

    def write(self, data: Any) -> None:
        """Append bytes, or anything that exposes them; large ones without a copy."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK_BYTES):
            chunk = view[start : start + _CHUNK_BYTES]
            self._hash.update(chunk)
            while chunk:
                written = self._file.write(chunk)
                self._size += written
                chunk = chunk[written:]

    def close(self) -> FileRecord:
        """Wait until the content is on the disk."""
        with self._file:
            os.fsync(self._file.fileno())
        return FileRecord(self._size, f"xxh3:{self._hash.hexdigest()}")

    def abandon(self) -> None:
        """Close after a failure, without waiting."""
        self._file.close()


def write_bytes(path: Path, content: bytes) -> FileRecord:
    """Write a whole file durably.

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
    """Write JSON durably; NaN and infinities are refused, as other readers refuse them."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    return write_bytes(path, text.encode())


def record_of(path: Path) -> FileRecord:
    """Size and checksum of a file as it is."""
    digest, size = xxhash.xxh3_64(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, f"xxh3:{digest.hexdigest()}")


def make_durable(path: Path) -> FileRecord:
    """Wait until a file that somebody else wrote is on the disk; its size and checksum."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return record_of(path)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
