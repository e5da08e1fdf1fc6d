"""Reading of JSON lines from spans of files, so that a stream can begin inside of a file."""

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
    """Cut a file with one object per line into spans of at most ``SHARD_BYTES`` bytes.

    A file in another form (one array, objects over several lines) is returned as one span.
    """
    size = Path(file).stat().st_size
    step = SHARD_BYTES if holds_lines(file) else max(1, size)
    return [(file, start, min(start + step, size)) for start in range(0, size, step)]


def holds_lines(file: str) -> bool:
    """Tell from its first line whether a file has one object per line."""
    with open(file, "rb") as lines:
        for line in iter(lambda: lines.readline(_SNIFF_BYTES), b""):
            if line.strip():
                try:
                    return isinstance(json.loads(line), dict)
                except ValueError:
                    return False
    return False


def placed_values(span: Span) -> Iterator[tuple[str, Any]]:
    """Yield place and value of each line that begins in a span and is not blank.

    Raises:
        DataError: a line is not JSON.
    """
    path, start, stop = span
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # the end of a line that began before the span
        number = 0
        while (position := file.tell()) < stop:
            line = file.readline()
            number += 1
            if not line.strip():
                continue
            # A later span is not numbered: that would take reading all lines before it.
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
    """Return a stream of texts of files with one object per line; None where a file has none.

    It can begin inside of a file, whereas ``datasets`` reads a file from its beginning to reach a
    row. A value in ``columns`` that is neither text nor null is an error when it is read.
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
        DataError: a line is no object, or has a value that is neither text nor null in a column.
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
