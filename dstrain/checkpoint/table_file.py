"""The file of a checkpoint that holds the table of its slices."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dstrain.checkpoint.files import reading
from dstrain.checkpoint.slice_table import Kind, Numbers, Run, SliceTable
from dstrain.core.documents import AtLeastOne, Number, Text, parsed, typed
from dstrain.core.files import FileRecord
from dstrain.models import Stored, TensorReader, write_tensor_file

_Kinds: Any = tuple[tuple[Text, ...], ...]
_Numbers: Any = tuple[Mapping[Text, Number], ...]
# Columns of the tensors; a parameter is its place among the sorted names.
_COLUMNS = {
    "even": ("parameter", "kind"),
    "runs": ("parameter", "start", "numel", "rank", "kind"),
    "scalars": ("parameter", "numbers"),
}


def write_table(path: Path, table: SliceTable, names: Iterable[str]) -> FileRecord:
    """Write a table of slices durably.

    Args:
        path: the file.
        table: what is written.
        names: of all parameters of the checkpoint.

    Raises:
        OSError: the disk is full, the folder is gone, and so on.
    """
    place = {name: number for number, name in enumerate(sorted(names))}
    numbers: dict[int, int] = {}  # equal ones are one object
    distinct: list[Numbers] = []
    for found in table.scalars.values():
        if id(found) not in numbers:
            numbers[id(found)] = len(distinct)
            distinct.append(found)
    rows = {
        "even": [(place[name], kind) for name, kind in table.even.items()],
        "runs": [
            (place[name], run.start, run.numel, run.rank, run.kind)
            for name, runs in table.runs.items()
            for run in runs
        ],
        "scalars": [(place[name], numbers[id(found)]) for name, found in table.scalars.items()],
    }
    tensors = [
        Stored.of(name, torch.tensor(rows[name], dtype=torch.int64).view(-1, len(columns)))
        for name, columns in _COLUMNS.items()
    ]
    about = {"world_size": table.world_size, "kinds": table.kinds, "numbers": distinct}
    return write_tensor_file(path, tensors, {key: json.dumps(v) for key, v in about.items()})


def read_table(path: Path, world_size: int, shapes: Mapping[str, tuple[int, ...]]) -> SliceTable:
    """Read a table of slices.

    Args:
        path: the file.
        world_size: ranks that wrote the checkpoint.
        shapes: of its parameters.

    Raises:
        CheckpointError: the file is damaged, or contradicts what is known of the checkpoint.
    """
    with reading(path) as file:
        about = {
            key: typed(parsed(file.metadata[key].encode()), kind)
            for key, kind in (("world_size", AtLeastOne), ("kinds", _Kinds), ("numbers", _Numbers))
        }
        if about["world_size"] != world_size:
            raise ValueError(f"it is of {about['world_size']} ranks, the manifest of {world_size}")
        names = sorted(shapes)
        sizes = torch.tensor([torch.Size(shapes[name]).numel() for name in names])
        rows = {name: _rows(file, name) for name in _COLUMNS}
        limits = {"parameter": len(names), "kind": len(about["kinds"]), "rank": world_size}
        _check(rows, {**limits, "numbers": len(about["numbers"])}, sizes)
    return _table(world_size, names, about["kinds"], about["numbers"], rows)


def _rows(file: TensorReader, name: str) -> torch.Tensor:
    rows = file.whole(name)
    if rows.dtype != torch.int64 or rows.dim() != 2 or rows.shape[1] != len(_COLUMNS[name]):
        raise ValueError(f"{name} does not have {len(_COLUMNS[name])} columns of whole numbers")
    return rows


def _check(
    rows: Mapping[str, torch.Tensor], limits: Mapping[str, int], sizes: torch.Tensor
) -> None:
    """Check every number for its range.

    Raises:
        ValueError: naming the column.
    """
    for name, columns in _COLUMNS.items():
        for number, column in enumerate(columns):
            values = rows[name][:, number]
            if (values < 0).any() or (column in limits and (values >= limits[column]).any()):
                raise ValueError(f"column {column} of {name} has a number out of range")
    for name in ("even", "scalars"):
        if rows[name][:, 0].unique().numel() != len(rows[name]):
            raise ValueError(f"{name} has a parameter twice")
    parameter, start, numel = rows["runs"][:, :3].unbind(1)
    if (numel > sizes[parameter] - start).any() or (numel == 0).any():
        raise ValueError("a run in runs does not lie in its parameter")
    if torch.isin(rows["even"][:, 0], parameter).any():
        raise ValueError("a parameter is divided evenly and has other runs too")


def _table(
    world_size: int,
    names: Sequence[str],
    kinds: tuple[Kind, ...],
    numbers: tuple[Numbers, ...],
    rows: Mapping[str, torch.Tensor],
) -> SliceTable:
    even = {names[parameter]: kind for parameter, kind in rows["even"].tolist()}
    runs: dict[str, list[Run]] = {}
    for parameter, *run in rows["runs"].tolist():
        runs.setdefault(names[parameter], []).append(Run(*run))
    for found in runs.values():
        found.sort()
    scalars = {names[parameter]: numbers[number] for parameter, number in rows["scalars"].tolist()}
    return SliceTable(world_size, kinds, even, runs, scalars)
