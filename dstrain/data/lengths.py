"""Lengths of a dataset's samples, from a column of lengths if there is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dstrain.core.errors import DataError, Problem
from dstrain.data.loader import is_stream

_BATCH_ROWS = 10_000


def sample_lengths(
    dataset: Any, *, column: str | None, main_input: str, what: str = "group_by_length=True"
) -> torch.Tensor:
    """Return the length of every sample: int64, shape (num_samples,).

    Args:
        dataset: a map-style dataset.
        column: column of a ``datasets.Dataset`` with the lengths; if it exists, no sample is read.
        main_input: key of the samples to measure if there is no such column (tokens of a text).
        what: the argument that needs the lengths, for messages.

    Raises:
        DataError: the dataset is a stream, or samples lack the key.
    """
    import datasets

    if is_stream(dataset):
        raise DataError(
            Problem(
                f"{what} with a stream",
                "samples can only be put together when all of their lengths are known",
                "leave it out, or give a dataset with a length",
            )
        )
    if isinstance(dataset, datasets.Dataset):
        if column in dataset.column_names:
            rows = dataset.select_columns([column]).with_format("numpy")[:]
            return torch.as_tensor(rows[column], dtype=torch.int64)
        if main_input in dataset.column_names:
            return _list_lengths(dataset, main_input)
    return torch.tensor(
        [_length(dataset[i], main_input, what) for i in range(len(dataset))], dtype=torch.int64
    )


def _list_lengths(dataset: Any, name: str) -> torch.Tensor:
    """Return the lengths of lists in a column, without converting elements to Python objects."""
    import pyarrow.compute

    rows = dataset.select_columns([name]).with_format("arrow")
    parts = [
        torch.as_tensor(pyarrow.compute.list_value_length(table[name]).to_pylist())
        for table in rows.iter(_BATCH_ROWS)
    ]
    return torch.cat(parts).to(torch.int64)


def _length(sample: Any, name: str, what: str) -> int:
    if not isinstance(sample, Mapping) or name not in sample:
        keys = list(sample) if isinstance(sample, Mapping) else type(sample).__name__
        raise DataError(
            Problem(
                f"{what} with samples that have no {name!r}",
                f"a sample has {keys}",
                "add a column with the lengths and name it in length_column_name, or leave it out",
            )
        )
    return len(sample[name])
