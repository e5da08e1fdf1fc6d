"""Text of the causal language model task: its sources, and the part that is held out.

Every source is read as one or two ``datasets`` objects with the one column ``text``, a document per
row. The held-out part depends only on a hash of names and contents, so that the split is the same
in every run and on every machine, and equal rows are never on both sides.

| source | a document is | held out when no validation data is named |
|---|---|---|
| standard library (no source is named) | a file | files by hash of their relative path |
| folder | a file (pieces of 256 KiB where it is larger) | files by hash of their relative path |
| one text file | a piece of at most 256 KiB | the tail, cut at a line boundary |
| jsonl, parquet, dataset | a row that is not blank | rows by hash of their text |
| streamed jsonl, parquet, dataset | a row that is not blank | the first 1,000 rows |

Only the training text and a named ``validation_split`` are ever streamed. A large file is then
several shards, at each of which a resumed run can begin to read: see ``--streaming``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, IterableDataset

from dstrain.tasks.causal_lm.arguments import DataArguments
from dstrain.tasks.causal_lm.text_files import split_text
from dstrain.tasks.common.files import origins
from dstrain.tasks.common.origin import Origin, Side
from dstrain.tasks.common.rows import load_rows, rows_side, split_rows


@dataclass(frozen=True)
class Documents:
    """Documents of both splits, in rows ``{"text": str}``.

    Attributes:
        train: training documents; an ``IterableDataset`` if they are streamed.
        validation: held-out documents; None if nothing was held out. Streamed only if they are the
            ``validation_split`` of a streamed dataset.
        description: sources and sizes of both splits, for the log.
        train_bytes: UTF-8 bytes of ``train``; None if they are not known without reading it.
        validation_bytes: UTF-8 bytes of ``validation``, or None.
        train_fingerprint: changes when ``train`` does; None for a stream, which is not cached.
        validation_fingerprint: changes when ``validation`` does; None for a stream.
    """

    train: Dataset | IterableDataset
    validation: Dataset | IterableDataset | None
    description: str
    train_bytes: int | None = None
    validation_bytes: int | None = None
    train_fingerprint: str | None = None
    validation_fingerprint: str | None = None


def load_documents(
    args: DataArguments,
    *,
    main_first: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Documents:
    """Read the text that ``args`` names, and hold out a part for validation.

    Files are written to the cache of ``datasets`` once, and memory-mapped from then on.

    Args:
        args: sources of the text, and the share to hold out.
        main_first: returns a context in which the main rank of a machine runs before its other
            ranks, which then find the cache.

    Raises:
        DataError: the text is missing, empty or unreadable, or lacks the named column.
    """
    with main_first():
        origin, held_out_origin = origins(args)
        percentage = 0.0 if held_out_origin else args.validation_percentage
        if origin.builder:
            train, held_out = split_rows(_load(origin, args), percentage, origin, args)
        else:
            train, held_out = split_text(origin, percentage, streaming=args.streaming)
        if held_out_origin:
            held_out = _read_whole(held_out_origin, args)
    skipped = f" ({origin.num_skipped} files are not UTF-8 text)" if origin.num_skipped else ""
    return Documents(
        train=train.rows,
        validation=held_out.rows if held_out else None,
        description=f"{train.size}: {origin.label}{skipped}; "
        f"validation: {held_out.size if held_out else 'none'}",
        train_bytes=train.num_bytes,
        validation_bytes=held_out.num_bytes if held_out else None,
        train_fingerprint=train.fingerprint,
        validation_fingerprint=held_out.fingerprint if held_out else None,
    )


def _read_whole(origin: Origin, args: DataArguments) -> Side:
    """Read all text of a source that was named for validation."""
    if not origin.builder:
        return split_text(origin, 0.0, streaming=False)[0]
    if origin.files:  # --validation_file
        args = replace(args, streaming=False)
    return rows_side(_load(origin, args))


def _load(origin: Origin, args: DataArguments) -> Dataset | IterableDataset:
    return load_rows(origin, args, {"text": args.text_column}, streaming=args.streaming)
