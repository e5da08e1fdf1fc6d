"""Index of a checkpoint's slices: the files with the elements of each parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dstrain.checkpoint import content
from dstrain.checkpoint.files import reading
from dstrain.checkpoint.manifest import Manifest
from dstrain.core.documents import Count, Number, Text, parsed, typed, unreadable
from dstrain.core.errors import CheckpointError, Problem
from dstrain.engine import MASTER, WEIGHT

_Spans: Any = Mapping[Text, tuple[Count, Count]]
_Scalars: Any = Mapping[Text, Mapping[Text, Number]]


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a parameter (under some key) that are in a file."""

    start: int
    numel: int
    path: Path


@dataclass(frozen=True)
class SliceIndex:
    """Files and positions of all slices of a checkpoint.

    Attributes:
        pieces: (key, parameter) -> pieces in order of their start.
        scalars: parameter -> single numbers of its optimizer state; an empty dict for a parameter
            whose state has tensors only.
    """

    pieces: dict[tuple[str, str], list[Piece]]
    scalars: dict[str, dict[str, Any]]

    def keys_of(self, name: str) -> list[str]:
        """List the kinds of tensors that a parameter has."""
        return [key for key, parameter in self.pieces if parameter == name]

    def missing(self, key: str, name: str, start: int, stop: int) -> int:
        """Count the elements from ``start`` to ``stop`` that no piece has."""
        reached, missing = start, 0
        for piece in self.pieces.get((key, name), []):
            low, high = max(piece.start, reached), min(piece.start + piece.numel, stop)
            if low < high:
                missing += low - reached
                reached = high
        return missing + stop - reached


def read_index(folder: Path, manifest: Manifest) -> SliceIndex:
    """Read the headers of all slice files, without their tensors.

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
    pieces: dict[tuple[str, str], list[Piece]] = {}
    scalars: dict[str, dict[str, Any]] = {}
    absent = set(manifest.not_in(folder))
    for rank in range(manifest.world_size):
        file_name = content.slice_file(rank)
        if file_name in absent:
            continue
        path = folder / file_name
        if not manifest.has(file_name):
            raise unreadable(path, ValueError("the manifest does not list it"))
        with reading(path) as file:
            sizes = {name: file.numel(name) for name in file.keys()}  # noqa: SIM118
            spans = _mapping(file.metadata, "spans", _Spans)
            numbers_of = _mapping(file.metadata, "scalars", _Scalars)
            _check_spans(spans, sizes, manifest)
        for name, numbers in numbers_of.items():
            held = scalars.setdefault(name, {})
            for key, value in numbers.items():
                held[key] = max(held.get(key, value), value)
        for tensor in sizes:
            key, _, name = tensor.partition("/")
            pieces.setdefault((key, name), []).append(Piece(spans[name][0], spans[name][1], path))
            if key not in (MASTER, WEIGHT):
                scalars.setdefault(name, {})
    for found in pieces.values():
        found.sort(key=lambda piece: piece.start)
    return SliceIndex(pieces, scalars)


def _check_spans(
    spans: Mapping[str, tuple[int, int]], sizes: Mapping[str, int], manifest: Manifest
) -> None:
    """Check the metadata of a file of slices against its tensors and the parameters.

    Raises:
        ValueError: metadata, tensors and parameters contradict each other.
    """
    for name, (start, numel) in spans.items():
        if name not in manifest.parameters:
            raise ValueError(f"{name} is none of the checkpoint's parameters")
        whole = torch.Size(manifest.parameters[name]).numel()
        if start + numel > whole:
            raise ValueError(
                f"it has elements {start} to {start + numel} of {name}, which has {whole}"
            )
    for tensor, size in sizes.items():
        _, _, name = tensor.partition("/")
        if name not in spans:
            raise ValueError(f"its spans do not name {tensor}")
        if size != spans[name][1]:
            raise ValueError(f"it has {size} elements of {tensor}, its spans say {spans[name][1]}")


def check_coverage(index: SliceIndex, manifest: Manifest) -> list[str]:
    """Return a line for each parameter whose slices lack elements or have some twice."""
    found = []
    optimized = set(manifest.optimized)
    for name, shape in manifest.parameters.items():
        numel = torch.Size(shape).numel()
        keys = index.keys_of(name) or [MASTER if name in optimized else WEIGHT]
        for key in keys:
            there = sum(piece.numel for piece in index.pieces.get((key, name), []))
            if missing := index.missing(key, name, 0, numel):
                found.append(f"{key} of {name}: {missing} of {numel} elements are in no file")
            elif there > numel and not manifest.elsewhere:
                found.append(f"{key} of {name}: {there - numel} elements are there twice or more")
    return found


def _mapping(metadata: Mapping[str, str], name: str, kind: Any) -> Any:
    """Read an entry of the metadata of a file of slices.

    Raises:
        ValueError: the entry is missing or malformed.
    """
    if name not in metadata:
        raise ValueError(f"it has no {name} in its metadata: it is no file of slices")
    try:
        return typed(parsed(metadata[name].encode()), kind)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
