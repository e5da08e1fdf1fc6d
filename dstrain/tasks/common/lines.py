"""Streams of JSON lines that can begin inside of a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import Features, IterableDataset, Value

from dstrain.core.errors import DataError, Problem
from dstrain.tasks.common.origin import SHARD_BYTES

Span = tuple[str, int, int]
"""A file, and the bytes in which the lines begin that are meant: first, and after the last."""
_SNIFF_BYTES = 16 * 1024 * 1024


def stream_lines(files: Sequence[str], columns: Sequence[str]) -> IterableDataset | None:
    """The rows of files with an object per line, or None where a file is not like that.

    ``datasets`` would read a file from its beginning to reach a row in it. Other values than text
    and null in a column are an error, when they are met.
    """
    if not all(map(_holds_lines, files)):
        return None
    spans = [span for file in files for span in _spans(file)]
    return IterableDataset.from_generator(
        read_lines,
        features=Features({column: Value("string") for column in columns}),
        gen_kwargs={"spans": spans, "columns": tuple(columns)},
    )


def _holds_lines(file: str) -> bool:
    with open(file, "rb") as lines:
        for line in iter(lambda: lines.readline(_SNIFF_BYTES), b""):
            if line.strip():
                try:
                    return isinstance(json.loads(line), dict)
                except ValueError:
                    return False
    return False


def _spans(file: str) -> Iterator[Span]:
    size = Path(file).stat().st_size
    for start in range(0, size, SHARD_BYTES):
        yield file, start, min(start + SHARD_BYTES, size)


def read_lines(spans: Sequence[Span], columns: Sequence[str]) -> Iterator[dict[str, str | None]]:
    """The ``columns`` of the objects in the lines that begin in ``spans``; blank lines left out.

    Raises:
        DataError: a line that is no object, or that has neither text nor null in a column.
    """
    for path, start, stop in spans:
        with open(path, "rb") as file:
            if start:
                file.seek(start - 1)
                file.readline()  # the end of a line that began before
            while (position := file.tell()) < stop:
                line = file.readline()
                if line.strip():
                    yield _texts(line, columns, f"the line at byte {position:,} of {path}")


def _texts(line: bytes, columns: Sequence[str], place: str) -> dict[str, str | None]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(Problem(f"{place} is not JSON", str(error), "mend the file")) from None
    if not isinstance(row, dict):
        raise DataError(Problem(f"{place} is not a JSON object", "", "mend the file"))
    texts = {column: row.get(column) for column in columns}
    for column, text in texts.items():
        if text is not None and not isinstance(text, str):
            kind = type(text).__name__
            raise DataError(Problem(f"{column!r} of {place} holds {kind}", "text is expected"))
    return texts
