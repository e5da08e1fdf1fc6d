"""Pairs of the sequence-to-sequence task: their sources, and the part that is held out.

Data is read as one or two datasets with the columns ``source`` and ``target``. The held-out part
depends only on a hash of names and contents, so that the split is the same in every run and on
every machine, and equal sources are never on both sides.

| data | a pair is | held out when no validation data is named |
|---|---|---|
| standard library | a function's body, its docstring's first line | files by hash of their path |
| jsonl, csv, parquet, dataset | a row without a blank text | rows by hash of their source |
| streamed jsonl, csv, parquet, dataset | a row without a blank text | the first 1,000 rows |

Only the training pairs and a named ``validation_split`` are ever streamed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, IterableDataset

from dstrain.core.errors import DataError, Problem
from dstrain.tasks.common.files import origins
from dstrain.tasks.common.origin import ROW_BUILDERS, Origin
from dstrain.tasks.common.rows import load_rows, rows_side, split_rows
from dstrain.tasks.seq2seq.arguments import DataArguments
from dstrain.tasks.seq2seq.library import split_library


@dataclass(frozen=True)
class Pairs:
    """Pairs of both splits, in rows ``{"source": str, "target": str}``.

    Attributes:
        train: pairs to train on; an ``IterableDataset`` if they are streamed.
        validation: held-out pairs; None if nothing was held out. Streamed only if they are the
            ``validation_split`` of a streamed dataset.
        description: sources and sizes of both splits, for the log.
        train_fingerprint: changes when ``train`` does; None for a stream, which is not cached.
        validation_fingerprint: changes when ``validation`` does; None for a stream.
    """

    train: Dataset | IterableDataset
    validation: Dataset | IterableDataset | None
    description: str
    train_fingerprint: str | None
    validation_fingerprint: str | None


def load_pairs(
    args: DataArguments,
    *,
    main_first: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Pairs:
    """Read the pairs that ``args`` names, and hold out a part for validation.

    Raises:
        DataError: the data is missing, empty or unreadable, or lacks the named columns.
    """
    with main_first():
        origin, held_out_origin = origins(args)
        percentage = 0.0 if held_out_origin else args.validation_percentage
        if args.train_file is None and args.dataset_name is None:
            train, held_out = split_library(origin, percentage, streaming=args.streaming)
        else:
            rows = _load(origin, args)
            train, held_out = split_rows(rows, percentage, origin, args, key="source")
        if held_out_origin:
            whole = replace(args, streaming=args.streaming and not held_out_origin.files)
            held_out = rows_side(_load(held_out_origin, whole))
    return Pairs(
        train=train.rows,
        validation=held_out.rows if held_out else None,
        description=f"{train.size}: {origin.label}; "
        f"validation: {held_out.size if held_out else 'none'}",
        train_fingerprint=train.fingerprint,
        validation_fingerprint=held_out.fingerprint if held_out else None,
    )


def _load(origin: Origin, args: DataArguments) -> Any:
    """Load the rows of an origin, with the columns ``source`` and ``target``."""
    if origin.builder is None:
        raise DataError(
            Problem(
                f"{origin.label} is text without rows",
                "a pair is a row with a source and a target",
                f"give a file of rows: {', '.join(ROW_BUILDERS)}",
            )
        )
    columns = {"source": args.source_column, "target": args.target_column}
    return load_rows(origin, args, columns, streaming=args.streaming)
