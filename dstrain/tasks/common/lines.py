"""JSON lines, read from spans of files, so that a stream of them can begin inside of a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Features, IterableDataset, Value

from dstrain.core.errors import DataError, Problem
from dstrain.tasks.common.origin import SHARD_BYTES

Span = tuple[str, int, int]
"""A file and two positions in bytes; lines that begin between them belong to the span."""
_SNIFF_BYTES = 16 * 1024 * 1024


def spans_of(file: str) -> list[Span]:
    """Cut a file with an object per line into spans of at most ``SHARD_BYTES``.

    A file of another form (one array, an object over several lines) is one span.
    """
    size = Path(file).stat().st_size
    step = SHARD_BYTES if holds_lines(file) else max(1, size)
    return [(file, start, min(start + step, size)) for start in range(0, size, step)]


def holds_lines(file: str) -> bool:
    """Tell whether a file has an object per line, by its first line."""
    with open(file, "rb") as lines:
        for line in iter(lambda: lines.readline(_SNIFF_BYTES), b""):
            if line.strip():
                try:
                    return isinstance(json.loads(line), dict)
                except ValueError:
                    return False
    return False


def placed_values(span: Span) -> Iterator[tuple[str, Any]]:
    """Yield the values of the lines that begin in a span, with their places; skip blank lines.

    Raises:
        DataError: a line that is not JSON.
    """
    path, start, stop = span
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # the end of a line that began before
        number = 0
        while (position := file.tell()) < stop:
            line = file.readline()
            number += 1
            if not line.strip():
                continue
            # To number the lines of a later span, those before it would have to be read.
            what = f"the line at byte {position:,}" if start else f"line {number}"
            place = f"{what} of {path}"
            try:
                value = json.loads(line)
            except ValueError as error:
                raise DataError(
                    Problem(f"{place} is not JSON", str(error), "mend the file")
                ) from None
            yield place, value


def stream_lines(files: Sequence[str], columns: Sequence[str]) -> IterableDataset | None:
    """Stream the texts of files with an object per line; None where a file has no such lines.

    ``datasets`` would read a file from its beginning to reach a row in it. Other values than text
    and null in a column are an error, when they are met.
    """
    if not all(map(holds_lines, files)):
        return None
    return IterableDataset.from_generator(
        read_texts,
        features=Features({column: Value("string") for column in columns}),
        gen_kwargs={
            "spans": [span for file in files for span in spans_of(file)],
            "columns": tuple(columns),
        },
    )


def read_texts(spans: Sequence[Span], columns: Sequence[str]) -> Iterator[dict[str, str | None]]:
    """Yield the ``columns`` of the objects in the lines that begin in ``spans``.

    Raises:
        DataError: a line that is no object, or that has neither text nor null in a column.
    """
    for span in spans:
        for place, row in placed_values(span):
            if not isinstance(row, dict):
                raise DataError(Problem(f"{place} is not a JSON object", "", "mend the file"))
            texts = {column: row.get(column) for column in columns}
            for column, text in texts.items():
                if text is not None and not isinstance(text, str):
                    what = f"{column!r} of {place} holds {type(text).__name__}"
                    raise DataError(Problem(what, "text is expected"))
            yield texts
