"""Lists of the files that a flag names or the standard library has: texts, or files of rows."""

from __future__ import annotations

import codecs
import os
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from dstrain.core.errors import DataError, Problem
from dstrain.core.files import expanded, told_refused
from dstrain.tasks.common.arguments import SourceArguments
from dstrain.tasks.common.origin import ROW_BUILDERS, Origin, TextPart

TEXT_SUFFIXES = (".txt", ".text", ".md")
SHARD_SUFFIXES = (".jsonl", ".ndjson", ".parquet")
"""A folder with nothing but files of one of these suffixes is read as rows, not as text."""
LIBRARY_SKIPPED = frozenset(
    # Tests are absent from the Python of Debian and of slim containers; encodings and pydoc_data
    # are generated tables. Without them the text is about the same on every machine.
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
_SNIFF_BYTES = 64 * 1024
_FOLDER_REMEDY = "give a folder of text files, or of nothing but .jsonl or .parquet files"


def origins(args: SourceArguments) -> tuple[Origin, Origin | None]:
    """Find the source of the training data, and that of validation data that is named, or None."""
    if args.dataset_name is not None:
        label = f"--dataset_name {args.dataset_name}"
        train = Origin(label, builder=args.dataset_name, split=args.train_split)
        if args.validation_split is not None:
            return train, replace(train, split=args.validation_split)
    elif args.train_file is not None:
        train = file_origin(args.train_file, "train_file")
    else:
        train = library_origin()
    if args.validation_file is not None:
        return train, file_origin(args.validation_file, "validation_file")
    return train, None


def library_origin() -> Origin:
    """Return the standard library of the running interpreter, its source code, as an origin."""
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


@told_refused(DataError)
def file_origin(name: str, flag: str) -> Origin:
    """Return the path that was given as ``--flag`` as an origin: of text, or of files of rows."""
    path, label = expanded(name), f"--{flag} {name}"
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
    """Return the origin of a folder: shards of rows if it has nothing else, or texts."""
    files = _list_files(path)
    if not files:
        raise DataError(
            Problem(
                f"{label} is a folder without files",
                f"looked in {path.absolute()} and the folders in it; hidden files do not count",
                _FOLDER_REMEDY,
            )
        )
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
                _FOLDER_REMEDY,
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
        return True  # no parquet file: the error comes when it is read


def _list_files(root: Path, skipped_folders: frozenset[str] = frozenset()) -> list[Path]:
    """List the files under ``root`` in order, without hidden files and compiled Python."""
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
    """Return the ``files`` that hold text, and the number of files without readable UTF-8 text."""
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
