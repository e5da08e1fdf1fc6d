"""The index of a checkpoint's slices: which file has which run of which parameter."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from dstrain.checkpoint import content
from dstrain.checkpoint.manifest import Manifest
from dstrain.checkpoint.slice_headers import read_rank_slices
from dstrain.checkpoint.slice_table import (
    Numbers,
    SliceTable,
    count_missing,
    even_run,
    table_of,
    uncovered,
)
from dstrain.checkpoint.table_file import read_table
from dstrain.core.documents import unreadable
from dstrain.core.errors import CheckpointError, Problem
from dstrain.engine import MASTER, WEIGHT


@dataclass(frozen=True)
class Piece:
    """A run of one parameter's values under one key, as it stands in a file."""

    start: int
    numel: int
    path: Path


@dataclass(frozen=True)
class SliceIndex:
    """The slices of a checkpoint that are in its folder.

    Attributes:
        folder: of the checkpoint.
        table: the slices of all ranks.
        shapes: parameter -> shape.
        absent: ranks whose files are not in the folder, but on another machine.
    """

    folder: Path
    table: SliceTable
    shapes: Mapping[str, tuple[int, ...]]
    absent: frozenset[int] = frozenset()
    _paths: dict[int, Path] = field(default_factory=dict, repr=False)

    def keys_of(self, name: str) -> list[str]:
        """List the kinds of tensors that a parameter has, in this folder or another machine's."""
        kinds = self.table.kinds
        if name in self.table.even:
            return list(kinds[self.table.even[name]])
        runs = self.table.runs.get(name, ())
        return list(dict.fromkeys(key for run in runs for key in kinds[run.kind]))

    def names(self) -> list[str]:
        """List the parameters that have slices."""
        return [name for name in self.shapes if self.keys_of(name)]

    @cached_property
    def scalars(self) -> dict[str, Numbers]:
        """Return the single numbers of the optimizer state of each parameter that has state.

        Those that had state without numbers are there with an empty mapping.
        """
        found = {}
        for name in self.shapes:
            has_state = any(key not in (MASTER, WEIGHT) for key in self.keys_of(name))
            if has_state or name in self.table.scalars:
                found[name] = self.table.scalars.get(name, {})
        return found

    def pieces(self, key: str, name: str, start: int = 0, stop: int | None = None) -> list[Piece]:
        """Return the pieces that have elements of a run, in the order of their start.

        The time grows with the pieces that are returned, and with the listed runs of a parameter
        that is not divided evenly.

        Args:
            key: kind of tensor.
            name: of the parameter.
            start: first element of the run.
            stop: its end; the parameter's, if left out.
        """
        numel = torch.Size(self.shapes.get(name, (0,))).numel()
        stop = numel if stop is None else min(stop, numel)
        return [
            Piece(begin, size, self._path(rank))
            for begin, size, rank in self._spans(key, name, numel, start, stop)
            if rank not in self.absent
        ]

    def _spans(
        self, key: str, name: str, numel: int, start: int, stop: int
    ) -> Iterator[tuple[int, int, int]]:
        """Yield start, size and rank of the pieces that overlap a run."""
        table = self.table
        if start >= stop:
            return
        if name in table.even:
            if key in table.kinds[table.even[name]]:
                size = even_run(numel, table.world_size, 0)[1]
                for rank in range(start // size, (stop - 1) // size + 1):
                    yield (*even_run(numel, table.world_size, rank), rank)
            return
        for run in table.runs.get(name, ()):
            if run.start >= stop:
                return
            if run.start + run.numel > start and key in table.kinds[run.kind]:
                yield run.start, run.numel, run.rank

    def missing(self, key: str, name: str, start: int, stop: int) -> int:
        """Count the elements from ``start`` to ``stop`` that no piece in the folder has."""
        return count_missing(self.pieces(key, name, start, stop), start, stop)

    def _path(self, rank: int) -> Path:
        if rank not in self._paths:
            self._paths[rank] = self.folder / content.slice_file(rank)
        return self._paths[rank]


def read_index(folder: Path, manifest: Manifest) -> SliceIndex:
    """Read the index of a checkpoint's slices; no tensor is touched.

    It stands in one file. Checkpoints of before dstrain wrote that file are indexed from the
    headers of all slice files, of which there are as many as ranks wrote.

    Raises:
        CheckpointError: the checkpoint has no slices, or a file is damaged.
    """
    if manifest.resumable and not manifest.has_slices:
        raise CheckpointError(
            Problem(
                f"{folder} is in DeepSpeed's own layout",
                "it has no slices by parameter name",
                f"convert it: dstrain checkpoint import {folder} OUT",
            )
        )
    if not manifest.resumable:
        raise CheckpointError(
            Problem(
                f"{folder} holds the model alone",
                "it was written with save_only_model=True, without optimizer state",
                "train from its weights with model_name_or_path, or choose another checkpoint",
            )
        )
    absent_files = set(manifest.not_in(folder))
    absent = set()
    for rank in range(manifest.world_size):
        name = content.slice_file(rank)
        if name in absent_files:
            absent.add(rank)
        elif not manifest.has(name):
            raise unreadable(folder / name, ValueError("the manifest does not list it"))
    if manifest.has(content.TABLE):
        table = read_table(folder / content.TABLE, manifest.world_size, manifest.parameters)
        return SliceIndex(folder, table, manifest.parameters, frozenset(absent))
    return SliceIndex(folder, table_from_headers(folder, manifest, absent), manifest.parameters)


def table_from_headers(
    folder: Path, manifest: Manifest, absent: Container[int] = frozenset()
) -> SliceTable:
    """Make the table of a checkpoint's slices from the headers of the files that hold them.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        absent: ranks whose files are not in the folder.

    Raises:
        CheckpointError: a file is damaged.
    """
    there = (rank for rank in range(manifest.world_size) if rank not in absent)
    parts = (
        (rank, read_rank_slices(folder / content.slice_file(rank), manifest.parameters))
        for rank in there
    )
    return table_of(parts, manifest.parameters, manifest.world_size)


def header_faults(
    folder: Path, manifest: Manifest, index: SliceIndex, share: tuple[int, int]
) -> list[str]:
    """List the slice files whose headers contradict the index, a line each.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        index: of its slices.
        share: (k, n): look at the files of every n-th rank only, from the k-th on.

    Raises:
        CheckpointError: a header cannot be read.
    """
    if not manifest.has(content.TABLE):
        return []  # the index was made from the headers
    found = []
    for rank in range(share[0], manifest.world_size, share[1]):
        if rank in index.absent:
            continue
        there = read_rank_slices(folder / content.slice_file(rank), manifest.parameters)
        wanted = index.table.of_rank(rank, index.shapes)
        if (there.spans, there.keys) != (wanted.spans, wanted.keys):
            found.append(f"{content.slice_file(rank)} has other slices than {content.TABLE} says")
    return found


def check_coverage(index: SliceIndex, manifest: Manifest) -> list[str]:
    """List, a line each, the parameters whose slices leave elements out or have some twice.

    The time grows with the number of parameters plus the number of ranks.
    """
    return _uncovered(index.table, manifest, may_have_copies=bool(manifest.elsewhere))


def check_whole(table: SliceTable, manifest: Manifest, *, may_have_copies: bool) -> None:
    """Refuse to commit a checkpoint whose slices are not all of the state.

    Args:
        table: the slices of all ranks.
        manifest: of the checkpoint.
        may_have_copies: whether elements may be in the files of several ranks.

    Raises:
        CheckpointError: elements of a parameter are in no file, or in several.
    """
    if faults := _uncovered(table, manifest, may_have_copies=may_have_copies):
        raise CheckpointError(
            [Problem(line) for line in faults], title="the slices are not all of the state"
        )


def _uncovered(table: SliceTable, manifest: Manifest, *, may_have_copies: bool) -> list[str]:
    optimized = set(manifest.optimized)
    return list(uncovered(table, manifest.parameters, optimized, ignore_copies=may_have_copies))
