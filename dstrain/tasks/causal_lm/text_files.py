"""Text files and folders of them: which there are, their pieces, their two sides."""

from __future__ import annotations

import codecs
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset
from pyarrow import parquet

from dstrain.core.errors import DataError, Problem
from dstrain.core.log import get_logger
from dstrain.tasks.causal_lm.documents import (
    FEATURES,
    PIECE_BYTES,
    ROW_BUILDERS,
    Origin,
    Side,
    TextPart,
    explained,
    fingerprint_of,
    num_held_out,
    unit_hash,
)

TEXT_SUFFIXES = (".txt", ".text", ".md")
SHARD_SUFFIXES = (".jsonl", ".ndjson", ".parquet")
"""A folder with nothing but files of one of these suffixes is read as rows, not as text."""
LIBRARY_SKIPPED = frozenset(
    # Tests are absent from the Python of Debian and of slim containers; encodings and pydoc_data
    # are generated tables. Without them the text is about the same on every machine.
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
_SNIFF_BYTES = 64 * 1024

_logger = get_logger(__name__)


def library_origin() -> Origin:
    """The source of the standard library of the running interpreter."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in _list_files(root, LIBRARY_SKIPPED)
        # _sysconfigdata_*.py is written when Python is built and differs on every machine.
        if path.suffix == ".py" and not path.name.startswith("_sysconfigdata")
    ]
    parts, skipped = _text_parts(files, root)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if not parts:
        raise DataError(
            Problem(
                "there is no training text",
                f"no data was named, and the Python standard library has no source at {root}",
                "give --train_file or --dataset_name",
            )
        )
    label = f"source of the Python {version} standard library ({root})"
    return Origin(label, parts=parts, num_skipped=skipped)


def file_origin(name: str, flag: str) -> Origin:
    """What the path given as ``--flag`` holds: text, or shards of rows."""
    path, label = Path(name).expanduser(), f"--{flag} {name}"
    if not path.exists():
        raise DataError(
            Problem(
                f"{label} does not exist",
                f"looked for {path.absolute()}",
                "check the path; a dataset of the Hub goes into --dataset_name",
            )
        )
    if path.is_dir():
        return _folder_origin(path, label)
    suffix = path.suffix.lower()
    if suffix not in (*TEXT_SUFFIXES, *ROW_BUILDERS):
        raise DataError(
            Problem(
                f"{label} has the unknown suffix {suffix!r}",
                f"text: {', '.join(TEXT_SUFFIXES)}; rows: {', '.join(ROW_BUILDERS)}",
                "rename or convert the file, or give the folder that holds it",
            )
        )
    if path.stat().st_size == 0:
        raise Origin(label).empty()
    if suffix in ROW_BUILDERS:
        return _rows_origin([path], suffix, label)
    return Origin(label, parts=(_part(path, path.name),), one_file=True)


def _folder_origin(path: Path, label: str) -> Origin:
    files = _list_files(path)
    suffixes = {p.suffix.lower() for p in files}
    if len(suffixes) == 1 and (suffix := suffixes.pop()) in SHARD_SUFFIXES:
        return _rows_origin(files, suffix, label)
    parts, skipped = _text_parts(files, path)
    if not parts:
        raise DataError(
            Problem(
                f"{label} holds no readable text",
                f"of its {len(files)} files, {skipped} are not readable UTF-8 text and "
                f"{len(files) - skipped} are empty",
                "give a folder of text files, or of nothing but .jsonl or .parquet files",
            )
        )
    return Origin(label, parts=parts, one_file=len(parts) == 1, num_skipped=skipped)


def _rows_origin(files: Sequence[Path], suffix: str, label: str) -> Origin:
    # datasets fails on a shard without rows, which is common among many.
    found = tuple(str(path) for path in files if _has_rows(path, suffix))
    if not found:
        raise Origin(label).empty()
    return Origin(label, builder=ROW_BUILDERS[suffix], files=found)


def _has_rows(path: Path, suffix: str) -> bool:
    if suffix != ".parquet" or not path.stat().st_size:
        return path.stat().st_size > 0
    try:
        return parquet.read_metadata(path).num_rows > 0
    except (OSError, pa.ArrowException):
        return True  # not parquet: reading it says so


def _list_files(root: Path, skipped_folders: frozenset[str] = frozenset()) -> list[Path]:
    """Files under ``root`` in order, without hidden ones and what Python compiled."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and name != "__pycache__" and name not in skipped_folders
        ]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _text_parts(files: Sequence[Path], root: Path) -> tuple[tuple[TextPart, ...], int]:
    """Those of ``files`` that hold text, and how many are not readable UTF-8 text."""
    parts, skipped = [], 0
    for path in files:
        try:
            with path.open("rb") as file:
                start = file.read(_SNIFF_BYTES)
            if b"\0" in start:
                raise ValueError("a NUL byte")
            codecs.getincrementaldecoder("utf-8")().decode(start, final=len(start) < _SNIFF_BYTES)
        except (OSError, ValueError):
            skipped += 1
            continue
        if start:
            parts.append(_part(path, path.relative_to(root).as_posix()))
    return tuple(sorted(parts, key=lambda part: part.name)), skipped


def _part(path: Path, name: str) -> TextPart:
    facts = path.stat()
    return TextPart(str(path.absolute()), name, 0, facts.st_size, facts.st_mtime_ns)


def read_pieces(parts: Sequence[TextPart], *, strict: bool) -> Iterator[dict[str, str]]:
    """The documents of ``parts`` in order, each at most ``PIECE_BYTES`` long, blank ones left out.

    The pieces of a part joined are its text unchanged, line endings included.

    Raises:
        DataError: when ``strict`` and a part is not UTF-8; otherwise it is logged and left out.
    """
    for part in parts:
        if not strict and (problem := _undecodable(part)):
            _logger.warning("left out: %s (%s)", problem.what, problem.why)
            continue
        with open(part.path, "rb") as file:
            for start, stop in _cuts(part):
                file.seek(start)
                data = file.read(stop - start)
                try:
                    text = data.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(_not_utf8(part, start + error.start, error.reason)) from None
                if text.strip():
                    yield {"text": text}


def _undecodable(part: TextPart) -> Problem | None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(part.path, "rb") as file:
        for position in range(0, part.stop, PIECE_BYTES):
            data = file.read(PIECE_BYTES)
            try:
                decoder.decode(data, final=position + len(data) >= part.stop)
            except UnicodeDecodeError as error:
                return _not_utf8(part, position + error.start, error.reason)
    return None


def _not_utf8(part: TextPart, position: int, reason: str) -> Problem:
    return Problem(
        f"{part.path} is not UTF-8 text",
        f"{reason} near byte {position:,}",
        "convert it, for example with iconv -f latin1 -t utf-8",
    )


def _cuts(part: TextPart) -> Iterator[tuple[int, int]]:
    start = part.start
    while part.stop - start > PIECE_BYTES:
        stop = _boundary(part.path, start + PIECE_BYTES // 2, start + PIECE_BYTES)
        yield start, stop
        start = stop
    yield start, part.stop


def _boundary(path: str, low: int, high: int) -> int:
    """Where to cut between bytes ``low`` and ``high``: after the last line, word or character."""
    with open(path, "rb") as file:
        file.seek(low)
        data = file.read(high - low)
    for mark in (b"\n", b" "):
        found = data.rfind(mark)
        if found >= 0:
            return low + found + 1
    # Not inside a character: step back over continuation bytes (10xxxxxx) to a first byte.
    end = len(data) - 1
    while end > 0 and data[end] & 0xC0 == 0x80:
        end -= 1
    return low + end


def split_text(origin: Origin, percentage: float, *, streaming: bool) -> tuple[Side, Side | None]:
    """The two sides of text files: by file, or for one file its head and its tail."""
    if origin.one_file:
        part = origin.parts[0]
        cut = part.stop
        if percentage > 0 and part.stop > 1:
            target = min(max(1, round(part.stop * (1 - percentage / 100))), part.stop - 1)
            cut = _boundary(part.path, max(0, target - PIECE_BYTES), target) or part.stop
        train = [replace(part, stop=cut)]
        held_out = [replace(part, start=cut)] if cut < part.stop else []
    else:
        ranked = sorted(origin.parts, key=lambda part: unit_hash(part.name))
        hashes = [unit_hash(part.name) for part in ranked]
        names = {part.name for part in ranked[: num_held_out(hashes, percentage)]}
        train = [part for part in origin.parts if part.name not in names]
        held_out = [part for part in origin.parts if part.name in names]
    side = _text_side(train, origin, streaming=streaming)
    if side is None:
        raise origin.empty()
    return side, _text_side(held_out, origin)


def _text_side(parts: list[TextPart], origin: Origin, *, streaming: bool = False) -> Side | None:
    """The documents of ``parts``, or None when all of them are blank."""
    kwargs: dict[str, Any] = {"parts": parts, "strict": origin.one_file}
    with explained(origin):
        if next(read_pieces(**kwargs), None) is None:
            return None
    num_bytes = sum(part.stop - part.start for part in parts)
    size = f"{len(parts):,} file{'s' * (len(parts) > 1)}, {num_bytes / 1e6:.1f} MB"
    if streaming:
        stream = IterableDataset.from_generator(read_pieces, features=FEATURES, gen_kwargs=kwargs)
        return Side(stream, num_bytes, None, size)
    fingerprint = fingerprint_of([astuple(part) for part in parts])
    with explained(origin):
        rows = Dataset.from_generator(
            read_pieces, features=FEATURES, gen_kwargs=kwargs, fingerprint=fingerprint
        )
    return Side(rows, num_bytes, fingerprint, size)
