"""Rows of jsonl, csv, parquet and datasets: reading their texts, and holding out a part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value, load_dataset

from dstrain.core.errors import DataError, Problem, nearest
from dstrain.tasks.common.arguments import SourceArguments
from dstrain.tasks.common.lines import stream_lines
from dstrain.tasks.common.origin import (
    Origin,
    Side,
    explained,
    fingerprint_of,
    num_held_out,
    unit_hash,
)

STREAM_VALIDATION_DOCUMENTS = 1000
"""Rows held out from a stream. Of less than twice as many rows the percentage is held out."""
STREAMED_TOGETHER = 32
"""Rows of a stream that are tokenised at once: few, so that the first samples come soon."""


def load_rows(
    origin: Origin, args: SourceArguments, columns: Mapping[str, str], *, streaming: bool = False
) -> Dataset | IterableDataset:
    """Load the rows of one split, without rows in which a text is blank.

    Args:
        origin: source of the rows.
        args: ``dataset_config_name`` and ``preprocessing_num_workers`` are used.
        columns: task's name of each text -> its column in the data; ``--NAME_column`` is the flag
            that named the column.
        streaming: read rows while they are used, and write nothing to disk.

    Returns:
        rows whose only columns are the names of the task, each a string.

    Raises:
        DataError: the data cannot be read, a column is missing or holds no text, or no row is left.
    """
    assert origin.builder is not None
    num_proc = None if streaming else args.preprocessing_num_workers
    with explained(origin):
        rows = load_dataset(
            origin.builder,
            None if origin.files else args.dataset_config_name,
            data_files=list(origin.files) or None,
            split=origin.split,
            streaming=streaming,
            num_proc=num_proc,
            **text_options(origin, columns.values()),
        )
        first = next(iter(rows), None)
        if first is None:
            raise origin.empty()
        for name, column in columns.items():
            _check_column(rows, first, origin, column, flag=f"{name}_column")
        if streaming and origin.files:
            rows = _in_shards(rows, first, origin, columns.values())
        rows = rows.select_columns(list(columns.values()))
        renamed = {column: name for name, column in columns.items() if column != name}
        if renamed:
            rows = rows.rename_columns(renamed)
        if streaming:
            rows = rows.filter(_is_text, input_columns=list(columns))
        else:
            rows = rows.filter(
                _are_texts,
                batched=True,
                input_columns=list(columns),
                num_proc=num_proc,
                desc="Leaving out blank rows",
            )
        if next(iter(rows), None) is None:
            flags = " or ".join(f"--{name}_column" for name in columns)
            named = " or ".join(map(repr, columns.values()))
            why = f"{named} is null, empty or white space in every row"
            remedy = f"name another column with {flags}, or give other data"
            raise DataError(Problem(f"{origin.label} holds no text", why, remedy))
    return rows


def _in_shards(
    rows: IterableDataset, first: dict[str, Any], origin: Origin, columns: Iterable[str]
) -> IterableDataset:
    """Cut a stream of rows into more shards, if its format allows it; it can begin at each."""
    if origin.builder == "parquet":
        return rows.reshard()
    lines = stream_lines(origin.files, tuple(columns)) if origin.builder == "json" else None
    if lines is None or any(first[c] != text for c, text in next(iter(lines)).items()):
        return rows  # datasets reads these files as other rows than ours
    return lines


def text_options(origin: Origin, columns: Iterable[str]) -> dict[str, Any]:
    """Return options of ``load_dataset`` that read columns of a CSV file as text, as written.

    Without them pandas guesses types: figures become numbers, and "None" a missing value.
    """
    if not origin.is_csv:
        return {}
    return {"converters": dict.fromkeys(columns, str), "keep_default_na": False}


def _check_column(
    rows: Dataset | IterableDataset, first: dict[str, Any], origin: Origin, name: str, *, flag: str
) -> None:
    """Refuse a column that is missing or does not hold text."""
    if name not in first:
        raise DataError(
            Problem(
                f"{origin.label} has no column {name!r}",
                f"its columns are {', '.join(map(repr, first))}",
                f"give --{flag} {nearest(name, list(first)) or next(iter(first))}",
            )
        )
    kind = rows.features[name] if rows.features else None
    dtype = getattr(kind, "dtype", type(first[name]).__name__)
    if dtype not in ("string", "large_string", "str", "NoneType", "null"):
        raise DataError(
            Problem(
                f"column {name!r} of {origin.label} holds {dtype}",
                "text is expected; json values that look like dates are read as dates",
                f"name another column with --{flag}, or store the values as text",
            )
        )


def split_rows(
    rows: Dataset | IterableDataset,
    percentage: float,
    origin: Origin,
    args: SourceArguments,
    *,
    key: str = "text",
) -> tuple[Side, Side | None]:
    """Split rows into a training side and a held-out side, by the hash of the text in ``key``.

    Of a stream, whose rows hold texts only, the first rows are held out.
    """
    if percentage == 0:
        return rows_side(rows), None
    if isinstance(rows, IterableDataset):
        return _split_stream(rows, percentage, origin, key)
    limit = percentage / 100
    if len(rows) < 20 / limit:  # so few that a side could be empty
        hashes = sorted({unit_hash(text) for batch in rows.iter(100) for text in batch[key]})
        limit = hashes[num_held_out(hashes, percentage)]
    train, held_out = (
        rows.filter(
            _in_split,
            batched=True,
            input_columns=[key],
            fn_kwargs={"limit": limit, "held_out": side},
            num_proc=args.preprocessing_num_workers,
            desc="Splitting rows",
        )
        for side in (False, True)
    )
    if not len(train):
        raise DataError(
            Problem(
                f"{origin.label} has nothing left to train on",
                "its rows are equal, and equal rows are held out together",
                "give other data, or --validation_percentage 0",
            )
        )
    return rows_side(train), rows_side(held_out) if len(held_out) else None


def _split_stream(
    rows: IterableDataset, percentage: float, origin: Origin, key: str
) -> tuple[Side, Side | None]:
    """Hold out the first rows of a stream, and rows with the same content later on."""
    with explained(origin):
        first = list(rows.take(2 * STREAM_VALIDATION_DOCUMENTS))
    count = STREAM_VALIDATION_DOCUMENTS
    if len(first) < 2 * count:
        count = max(1, round(len(first) * percentage / 100)) if len(first) > 1 else 0
    first = first[:count]
    # Compared by content, so that a later copy of a held-out row is left out too.
    seen = frozenset(unit_hash(row[key]) for row in first)
    train = rows.filter(_not_in, input_columns=[key], fn_kwargs={"seen": seen})
    columns = {name: [row[name] for row in first] for name in (first[0] if first else (key,))}
    features = Features(dict.fromkeys(columns, Value("string")))
    texts = [text for column in columns.values() for text in column]
    num_bytes = sum(len(text.encode()) for text in texts)
    kind = "documents" if key == "text" else "rows"
    size = f"the first {count:,} {kind}, {num_bytes / 1e6:.1f} MB"
    held_out = Dataset.from_dict(columns, features=features)
    side = Side(held_out, num_bytes, fingerprint_of(texts), size)
    return rows_side(train), side if count else None


def rows_side(rows: Dataset | IterableDataset) -> Side:
    """Return rows as a side; map-style rows have a size and a fingerprint, streams do not."""
    if isinstance(rows, IterableDataset):
        return Side(rows, None, None, "stream")
    return Side(rows, None, rows._fingerprint, f"{len(rows):,} rows")


def _is_text(*texts: str | None) -> bool:
    return all(text is not None and text.strip() for text in texts)


def _are_texts(*columns: list[str | None]) -> list[bool]:
    return [_is_text(*texts) for texts in zip(*columns, strict=True)]


def _in_split(texts: list[str], *, limit: float, held_out: bool) -> list[bool]:
    return [(unit_hash(text) < limit) == held_out for text in texts]


def _not_in(text: str, *, seen: frozenset[float]) -> bool:
    return unit_hash(text) not in seen
