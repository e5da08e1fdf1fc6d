"""Rows of jsonl, parquet and datasets: reading them, holding a part out."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, IterableDataset, load_dataset

from dstrain.core.errors import DataError, Problem, nearest
from dstrain.tasks.causal_lm.arguments import DataArguments
from dstrain.tasks.causal_lm.documents import (
    FEATURES,
    Origin,
    Side,
    explained,
    fingerprint_of,
    num_held_out,
    unit_hash,
)

STREAM_VALIDATION_DOCUMENTS = 1000
"""Documents held out from a stream; a stream of less than twice as many gives up its percentage."""


def load_rows(origin: Origin, args: DataArguments) -> Dataset | IterableDataset:
    """Rows of one split that are not blank, with the single column ``text``."""
    assert origin.builder is not None
    num_proc = None if args.streaming else args.preprocessing_num_workers
    with explained(origin):
        rows = load_dataset(
            origin.builder,
            None if origin.files else args.dataset_config_name,
            data_files=list(origin.files) or None,
            split=origin.split,
            streaming=args.streaming,
            num_proc=num_proc,
        )
        first = next(iter(rows), None)
        if first is None:
            raise origin.empty()
        _check_column(rows, first, origin, args.text_column)
        rows = rows.select_columns([args.text_column])
        if args.text_column != "text":
            rows = rows.rename_column(args.text_column, "text")
        if args.streaming:
            rows = rows.filter(_is_text, input_columns=["text"])
        else:
            rows = rows.filter(
                _are_texts,
                batched=True,
                input_columns=["text"],
                num_proc=num_proc,
                desc="Leaving out blank rows",
            )
        if next(iter(rows), None) is None:
            why = f"{args.text_column!r} is null, empty or white space in every row"
            remedy = "name another column with --text_column, or give other data"
            raise DataError(Problem(f"{origin.label} holds no text", why, remedy))
    return rows


def _check_column(
    rows: Dataset | IterableDataset, first: dict[str, Any], origin: Origin, name: str
) -> None:
    if name not in first:
        raise DataError(
            Problem(
                f"{origin.label} has no column {name!r}",
                f"its columns are {', '.join(map(repr, first))}",
                f"give --text_column {nearest(name, list(first)) or next(iter(first))}",
            )
        )
    kind = rows.features[name] if rows.features else None
    dtype = getattr(kind, "dtype", type(first[name]).__name__)
    if dtype not in ("string", "large_string", "str", "NoneType", "null"):
        raise DataError(
            Problem(
                f"column {name!r} of {origin.label} holds {dtype}",
                "text is expected; json values that look like dates are read as dates",
                "name another column with --text_column, or store the values as text",
            )
        )


def split_rows(
    rows: Dataset | IterableDataset, percentage: float, origin: Origin, args: DataArguments
) -> tuple[Side, Side | None]:
    """The rows to train on, and those held out by hash (of a stream: the first ones)."""
    if percentage == 0:
        return rows_side(rows), None
    if isinstance(rows, IterableDataset):
        return _split_stream(rows, percentage, origin)
    limit = percentage / 100
    if len(rows) < 20 / limit:  # so few that one side could come out empty
        hashes = sorted({unit_hash(text) for batch in rows.iter(100) for text in batch["text"]})
        limit = hashes[num_held_out(hashes, percentage)]
    train, held_out = (
        rows.filter(
            _in_split,
            batched=True,
            input_columns=["text"],
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
    rows: IterableDataset, percentage: float, origin: Origin
) -> tuple[Side, Side | None]:
    with explained(origin):
        texts = [row["text"] for row in rows.take(2 * STREAM_VALIDATION_DOCUMENTS)]
    count = STREAM_VALIDATION_DOCUMENTS
    if len(texts) < 2 * count:
        count = max(1, round(len(texts) * percentage / 100)) if len(texts) > 1 else 0
    texts = texts[:count]
    # By content, so that a later copy of a held-out row is left out too.
    seen = frozenset(unit_hash(text) for text in texts)
    train = rows.filter(_not_in, input_columns=["text"], fn_kwargs={"seen": seen})
    held_out = Dataset.from_dict({"text": texts}, features=FEATURES)
    num_bytes = sum(len(text.encode()) for text in texts)
    size = f"the first {count:,} documents, {num_bytes / 1e6:.1f} MB"
    side = Side(held_out, num_bytes, fingerprint_of(texts), size)
    return rows_side(train), side if count else None


def rows_side(rows: Dataset | IterableDataset) -> Side:
    """A side of rows, with the size and fingerprint that map-style rows know."""
    if isinstance(rows, IterableDataset):
        return Side(rows, None, None, "stream")
    return Side(rows, None, rows._fingerprint, f"{len(rows):,} rows")


def _is_text(text: str | None) -> bool:
    return text is not None and bool(text.strip())


def _are_texts(texts: list[str | None]) -> list[bool]:
    return [_is_text(text) for text in texts]


def _in_split(texts: list[str], *, limit: float, held_out: bool) -> list[bool]:
    return [(unit_hash(text) < limit) == held_out for text in texts]


def _not_in(text: str, *, seen: frozenset[float]) -> bool:
    return unit_hash(text) not in seen
