"""Origin of data, its training and held-out sides, and the hash by which they are split."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from dstrain.core.errors import DataError, Problem
from dstrain.tasks.common.cache import cache_problem

ROW_BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
"""Suffixes of files of rows -> builders of ``datasets.load_dataset`` that read them."""
SHARD_BYTES = 64 * 1024 * 1024
"""Largest shard of a stream; larger files are several. A resumed stream begins at a shard."""
_VERSION = 1  # of the documents; raise it when the same input gives other documents


@dataclass(frozen=True)
class TextPart:
    """Bytes ``start`` to ``stop`` of a text file.

    Attributes:
        path: the file.
        name: path relative to the folder, with ``/``; its hash decides the side.
        start: first byte.
        stop: byte after the last one.
        mtime_ns: modification time in nanoseconds, for the fingerprint.
    """

    path: str
    name: str
    start: int
    stop: int
    mtime_ns: int


@dataclass(frozen=True)
class Side:
    """Training side or held-out side of data.

    Attributes:
        rows: its rows.
        num_bytes: UTF-8 bytes of its text; None if they are not known without reading it.
        fingerprint: changes when ``rows`` do; None for a stream.
        size: size in words, for the log.
    """

    rows: Dataset | IterableDataset
    num_bytes: int | None
    fingerprint: str | None
    size: str


@dataclass(frozen=True)
class Origin:
    """Source of data.

    Attributes:
        label: its name in messages.
        parts: text files; empty for rows.
        one_file: whether the text is a single file, which is split inside.
        num_skipped: files of a folder that are not readable UTF-8 text.
        builder: builder or dataset name for ``datasets.load_dataset``; None for text.
        files: files of rows; empty for a dataset that is loaded by its name.
        split: split to load.
    """

    label: str
    parts: tuple[TextPart, ...] = ()
    one_file: bool = False
    num_skipped: int = 0
    builder: str | None = None
    files: tuple[str, ...] = ()
    split: str = "train"

    @property
    def is_csv(self) -> bool:
        """Tell whether the rows are read from files of comma-separated values."""
        return self.builder == "csv" and bool(self.files)

    def empty(self) -> DataError:
        """Return the error for a source in which all documents are blank, or that has none."""
        why = "there is not one document with anything but white space in it"
        return DataError(Problem(f"{self.label} holds no text", why, "give data with text in it"))


def unit_hash(key: str) -> float:
    """Hash ``key`` to a number in [0, 1), the same on every machine."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def num_held_out(hashes: list[float], percentage: float) -> int:
    """Count the sorted hashes to hold out: at least one, and not all, if there are two."""
    if percentage == 0:
        return 0
    return min(max(bisect_left(hashes, percentage / 100), 1), len(hashes) - 1)


def split_parts(
    parts: Sequence[TextPart], percentage: float
) -> tuple[list[TextPart], list[TextPart]]:
    """Split files by the hash of their names; return the training files and the held-out files."""
    ranked = sorted(parts, key=lambda part: unit_hash(part.name))
    hashes = [unit_hash(part.name) for part in ranked]
    names = {part.name for part in ranked[: num_held_out(hashes, percentage)]}
    train = [part for part in parts if part.name not in names]
    return train, [part for part in parts if part.name in names]


def fingerprint_of(facts: list[Any]) -> str:
    """Hash facts that JSON can hold, together with the version of the documents."""
    return hashlib.sha256(json.dumps([_VERSION, facts]).encode()).hexdigest()[:32]


@contextmanager
def explained(origin: Origin) -> Iterator[None]:
    """Turn errors of ``datasets``, inside the block, into one that names the flag and bad line."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # a DataError that was raised inside a generator of datasets
            if isinstance(cause, DataError):
                raise cause from None
            cause = cause.__cause__
        if (problem := cache_problem(error)) is not None:  # the data is not at fault
            raise DataError(problem) from error
        why = str(error.__cause__ or error).strip() or type(error).__name__
        by_name = origin.builder and not origin.files
        remedy = "check the name, the split and the network" if by_name else "mend the file"
        why = next(filter(None, map(_first_bad_line, origin.files)), why)
        raise DataError(Problem(f"{origin.label} could not be read", why, remedy)) from error


def _first_bad_line(file: str) -> str | None:
    """Return what is wrong with the first bad line of a file of JSON lines, or None."""
    if ROW_BUILDERS[Path(file).suffix.lower()] != "json":
        return None
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1 and line.lstrip().startswith(b"["):
                return None  # one array, not a value per line
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} of {file} is not a JSON object"
            except ValueError as error:
                return f"line {number} of {file} is not JSON: {error}"
    return None
