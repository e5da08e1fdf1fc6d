"""Raw text of the causal language model task: what is read, and which part is held out.

Every source becomes one or two ``datasets`` objects with one column ``text``, a document per row.
What is held out depends only on names and contents, through a hash, so the split is the same on
every run and machine, and equal rows never fall on both sides.

| source | a document is | held out when no validation data is named |
|---|---|---|
| nothing: standard library | a file | files by hash of their relative path |
| folder | a file (pieces of 256 KiB where it is larger) | files by hash of their relative path |
| one text file | a piece of at most 256 KiB | the tail, cut at a line boundary |
| jsonl, parquet, dataset | a row that is not blank | rows by hash of their text |
| the same, streamed | a row that is not blank | the first 1,000, left out of training |

Only the training text and a named ``validation_split`` are ever streamed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from dstrain.tasks.causal_lm.arguments import DataArguments
from dstrain.tasks.causal_lm.documents import Documents, Origin, Side
from dstrain.tasks.causal_lm.rows import load_rows, rows_side, split_rows
from dstrain.tasks.causal_lm.text_files import file_origin, library_origin, split_text


def load_documents(
    args: DataArguments,
    *,
    main_first: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Documents:
    """Read the text that ``args`` names and hold out a validation part.

    Files are read into the cache of ``datasets`` once and memory-mapped from then on.

    Args:
        args: which text, and how much to hold out.
        main_first: called for a context in which the main rank of a machine runs before the
            others, which then find its cache.

    Raises:
        DataError: for text that is missing, empty, unreadable or without the named column.
    """
    with main_first():
        origin, held_out_origin = _origins(args)
        percentage = 0.0 if held_out_origin else args.validation_percentage
        if origin.builder:
            train, held_out = split_rows(load_rows(origin, args), percentage, origin, args)
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


def _origins(args: DataArguments) -> tuple[Origin, Origin | None]:
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


def _read_whole(origin: Origin, args: DataArguments) -> Side:
    """All of a named validation text."""
    if not origin.builder:
        return split_text(origin, 0.0, streaming=False)[0]
    if origin.files:  # --validation_file
        args = replace(args, streaming=False)
    return rows_side(load_rows(origin, args))
