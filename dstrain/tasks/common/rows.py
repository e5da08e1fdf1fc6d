"""Rows of jsonl, csv, parquet and datasets: reading their texts, holding a part out."""

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
"""Documents held out from a stream; a stream of less than twice as many gives up its percentage."""
STREAMED_TOGETHER = 32
"""Rows of a stream that are tokenised at once: few, so that the first samples come soon."""


def load_rows(
    origin: Origin, args: SourceArguments, columns: Mapping[str, str], *, streaming: bool = False
) -> Dataset | IterableDataset:
    """Load the rows of one split, without those that have a blank text.

    Args:
        origin: what to read.
        args: ``dataset_config_name`` and ``preprocessing_num_workers`` are read.
        columns: our name of each text -> its column in the data; ``NAME_column`` is its flag.
        streaming: read while it is used, nothing written to disk.

    Returns:
        rows with our names as their only columns, each a string.

    Raises:
        DataError: unreadable data, a column that is missing or holds no text, no row left.
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
    """Give a stream of rows more shards, at whose starts it can begin, where the format has any."""
    if origin.builder == "parquet":
        return rows.reshard()
    lines = stream_lines(origin.files, tuple(columns)) if origin.builder == "json" else None
    if lines is None or any(first[c] != text for c, text in next(iter(lines)).items()):
        return rows  # of a form that datasets makes rows of in its own way
    return lines


def text_options(origin: Origin, columns: Iterable[str]) -> dict[str, Any]:
    """Return options that make ``load_dataset`` read columns of a CSV file as they are written.

    Else pandas would guess: a column of figures would be numbers, and "None" no text.
    """
    if not origin.is_csv:
        return {}
    return {"converters": dict.fromkeys(columns, str), "keep_default_na": False}


def _check_column(
    rows: Dataset | IterableDataset, first: dict[str, Any], origin: Origin, name: str, *, flag: str
) -> None:
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
    """Split rows into those to train on, and those held out by the hash of their ``key``.

    Of a stream, whose rows hold texts only, the first ones are held out.
    """
    if percentage == 0:
        return rows_side(rows), None
    if isinstance(rows, IterableDataset):
        return _split_stream(rows, percentage, origin, key)
    limit = percentage / 100
    if len(rows) < 20 / limit:  # so few that one side could come out empty
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
    with explained(origin):
        first = list(rows.take(2 * STREAM_VALIDATION_DOCUMENTS))
    count = STREAM_VALIDATION_DOCUMENTS
    if len(first) < 2 * count:
        count = max(1, round(len(first) * percentage / 100)) if len(first) > 1 else 0
    first = first[:count]
    # By content, so that a later copy of a held-out row is left out too.
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
    """Make a side of rows, with the size and fingerprint that map-style rows know."""
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
