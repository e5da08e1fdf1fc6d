"""Comparison of two checkpoints: values of every tensor, state of the run, config, metrics.

The checkpoints may have been written by any number of ranks at any stage. Values are compared piece
by piece, so that memory holds a few megabytes of each, for checkpoints of any size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dstrain.checkpoint import content
from dstrain.checkpoint.export import slice_files
from dstrain.checkpoint.files import reading
from dstrain.checkpoint.manifest import Manifest, read_manifest, require_files
from dstrain.checkpoint.run_files import read_run
from dstrain.checkpoint.slice_index import Piece, SliceIndex, read_index
from dstrain.config import difference as configs
from dstrain.core.documents import read_document
from dstrain.models import TensorReader

_CHUNK_NUMEL = 2**20
_MOST_FILES = 64
_COMPARED_FIELDS = (
    "step",
    "world_size",
    "stage",
    "precision",
    "resumable",
    "has_weights",
    "layout",
)
# Timings, which differ between any two runs.
_NOT_COMPARED = ("position.meters",)


@dataclass(frozen=True)
class TensorDifference:
    """Difference between two tensors of the same name.

    Attributes:
        key: kind of tensor: "master", "exp_avg" and so on in slices; "buffer" in the file of
            buffers, "model" in Hugging Face files.
        name: name of the parameter or buffer.
        numel: number of elements.
        different: number of elements that differ.
        largest: largest absolute difference.
    """

    key: str
    name: str
    numel: int
    different: int
    largest: float


@dataclass(frozen=True)
class Comparison:
    """All differences between two checkpoints.

    Attributes:
        values: differing plain values, as (title of the group, name, first value, second value).
        tensors: tensors whose values differ.
        num_compared: number of tensors compared: those that both have in the same size.
    """

    values: tuple[tuple[str, str, Any, Any], ...]
    tensors: tuple[TensorDifference, ...]
    num_compared: int

    def __bool__(self) -> bool:
        """Tell whether anything differs."""
        return bool(self.values or self.tensors)


def compare(
    first: Path,
    second: Path,
    *,
    on_tensor: Callable[[str], object] = lambda name: None,
    on_file: Callable[[int], object] = lambda num_bytes: None,
) -> Comparison:
    """Verify the files of two committed checkpoints, and compare them.

    Args:
        first: a checkpoint.
        second: the checkpoint to compare it with.
        on_tensor: called with the name of each tensor that has been compared.
        on_file: called with the bytes of each file that has been verified.

    Raises:
        CheckpointError: a folder is no checkpoint, or is damaged.
    """
    manifests = read_manifest(first), read_manifest(second)
    sliced = all(m.has_slices for m in manifests)
    for folder, manifest in zip((first, second), manifests, strict=True):
        require_files(folder, manifest, _read_files(folder, manifest, sliced), on_file=on_file)
    values = [*_manifest_values(*manifests), *_config_values(first, second, manifests)]
    pairs: list[tuple[str, str, list[Piece], list[Piece], int]] = []
    if all(m.resumable for m in manifests):
        values += _run_values(first, second)
    if all(m.has_slices for m in manifests):
        indices = read_index(first, manifests[0]), read_index(second, manifests[1])
        values += _state_values(*indices)
        pairs += _slice_pairs(*indices, manifests[0])
    pairs += _file_pairs(first, second, manifests, values)
    tensors = []
    with _Files() as files:
        for key, name, ours, theirs, numel in pairs:
            different, largest = _compared(files, f"{key}/{name}", ours, theirs, numel)
            if different:
                tensors.append(TensorDifference(key, name, numel, different, largest))
            on_tensor(name)
    return Comparison(tuple(values), tuple(tensors), len(pairs))


def _read_files(folder: Path, manifest: Manifest, sliced: bool) -> list[str]:
    """List the files that a comparison reads: slices if ``sliced``, else Hugging Face weights."""
    names = [n for n in (configs.RECORD_FILE, content.RUN, content.BUFFERS) if n in manifest.files]
    return names + (slice_files(folder, manifest) if sliced else _weight_files(manifest))


def _weight_files(manifest: Manifest) -> list[str]:
    """List the Hugging Face files that hold the model's weights."""
    return [n for n in manifest.files if n.startswith("model") and n.endswith(".safetensors")]


def _manifest_values(first: Manifest, second: Manifest) -> Iterator[tuple[str, str, Any, Any]]:
    for name in _COMPARED_FIELDS:
        if getattr(first, name) != getattr(second, name):
            yield "checkpoint", name, getattr(first, name), getattr(second, name)
    yield from _mapping_differences("shapes", _lists(first.parameters), _lists(second.parameters))
    trained = ({n: "trained" for n in m.optimized} for m in (first, second))
    yield from _mapping_differences("frozen or trained", *trained)
    yield from _mapping_differences("metrics", first.metrics, second.metrics)


def _lists(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in shapes.items()}


def _config_values(
    first: Path, second: Path, manifests: tuple[Manifest, Manifest]
) -> Iterator[tuple[str, str, Any, Any]]:
    if not all(configs.RECORD_FILE in m.files for m in manifests):
        return
    records = [
        read_document(f / configs.RECORD_FILE, configs.ConfigRecord) for f in (first, second)
    ]
    if all(r.deepspeed is not None and r.provenance is not None for r in records):
        for found in configs.differences(*map(asdict, records)):
            ours, theirs = found.this, found.other  # the value is None where a config has no key
            yield configs.TITLES[found.kind], found.name, ours.value, theirs.value


def _run_values(first: Path, second: Path) -> Iterator[tuple[str, str, Any, Any]]:
    flat = [dict(_leaves("", read_run(folder))) for folder in (first, second)]
    yield from _mapping_differences("state of the run", *flat)


def _state_values(first: SliceIndex, second: SliceIndex) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield differences in the optimizer state's kinds of tensors and in its single numbers."""
    sides = []
    for index in (first, second):
        sides.append({name: sorted(index.keys_of(name)) for name in index.names()})
    yield from _mapping_differences("kinds of state", *sides)
    yield from _mapping_differences("numbers of the optimizer", first.scalars, second.scalars)


def _slice_pairs(
    first: SliceIndex, second: SliceIndex, manifest: Manifest
) -> Iterator[tuple[str, str, list[Piece], list[Piece], int]]:
    for name in first.names():
        for key in first.keys_of(name):
            pieces, others = first.pieces(key, name), second.pieces(key, name)
            ends = {max(p.start + p.numel for p in found) for found in (pieces, others) if found}
            if pieces and others and len(ends) == 1 and name in manifest.parameters:
                yield key, name, pieces, others, ends.pop()


def _file_pairs(
    first: Path,
    second: Path,
    manifests: tuple[Manifest, Manifest],
    values: list[tuple[str, str, Any, Any]],
) -> Iterator[tuple[str, str, list[Piece], list[Piece], int]]:
    """Yield pairs of tensors from whole files: buffers, and weights where there are no slices.

    A tensor that one checkpoint lacks, or has in another size, is added to ``values``.
    """
    sides = list(zip((first, second), manifests, strict=True))
    buffers = [_whole(f, [n for n in m.files if n == content.BUFFERS]) for f, m in sides]
    kinds = [("buffer", buffers)]
    if not all(m.has_slices for m in manifests):
        weights = [_weight_files(m) for m in manifests]
        kinds.append(
            ("model", [_whole(f, w) for f, w in zip((first, second), weights, strict=True)])
        )
    for key, (ours, theirs) in kinds:
        for name in sorted(set(ours) | set(theirs)):
            if name in ours and name in theirs and ours[name].numel == theirs[name].numel:
                yield key, name, [ours[name]], [theirs[name]], ours[name].numel
            else:
                sizes = [side[name].numel if name in side else None for side in (ours, theirs)]
                values.append((f"elements of {key}s", name, sizes[0], sizes[1]))


def _whole(folder: Path, files: list[str]) -> dict[str, Piece]:
    """Index the tensors in some files of a checkpoint, each as one piece."""
    found = {}
    for path in (folder / file for file in sorted(files)):
        with reading(path) as file:
            for name in file.keys():  # noqa: SIM118 - a file is no dict
                found[name] = Piece(0, file.numel(name), path)
    return found


def _compared(
    files: _Files, tensor: str, ours: list[Piece], theirs: list[Piece], numel: int
) -> tuple[int, float]:
    """Return the number of elements that differ, and the largest absolute difference."""
    different, largest = 0, 0.0
    for start in range(0, numel, _CHUNK_NUMEL):
        stop = min(numel, start + _CHUNK_NUMEL)
        a, b = (files.read(tensor, pieces, start, stop) for pieces in (ours, theirs))
        if a.dtype == b.dtype and torch.equal(a, b):
            continue
        unequal = (a != b) & ~(a.isnan() & b.isnan())
        if count := int(unequal.sum()):
            different += count
            largest = max(largest, _largest(a.double() - b.double(), unequal))
    return different, largest


def _largest(gap: torch.Tensor, unequal: torch.Tensor) -> float:
    found = float(gap.abs_().max())
    if math.isnan(found):  # NaN on both sides is no difference; NaN on one side is an infinite one
        found = float(gap[unequal].nan_to_num(nan=math.inf).max())
    return found


class _Files(contextlib.ExitStack):
    """Cache of open tensor files, so that a file is not opened anew for each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[Path, TensorReader] = {}

    def read(self, tensor: str, pieces: list[Piece], start: int, stop: int) -> torch.Tensor:
        """Read the elements from ``start`` to ``stop`` of a flattened tensor."""
        parts = []
        for piece in pieces:
            low, high = max(piece.start, start), min(piece.start + piece.numel, stop)
            if low < high:
                file = self._file(piece.path)
                # Files of whole tensors have names without the key.
                name = tensor if tensor in file else tensor.partition("/")[2]
                parts.append(file.read(name, low - piece.start, high - piece.start))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _file(self, path: Path) -> TensorReader:
        if path not in self._open:
            if len(self._open) >= _MOST_FILES:
                self.close()
                self._open.clear()
            self._open[path] = self.enter_context(reading(path))
        return self._open[path]


def _mapping_differences(
    title: str, first: Mapping[str, Any], second: Mapping[str, Any]
) -> Iterator[tuple[str, str, Any, Any]]:
    for name in dict.fromkeys([*first, *second]):
        ours, theirs = first.get(name), second.get(name)
        if (name in first, repr(ours)) != (name in second, repr(theirs)):
            yield title, name, ours, theirs


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested values under dotted names; skip ``_NOT_COMPARED``."""
    if path in _NOT_COMPARED:
        return
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    else:
        yield path, value
        return
    for name, part in items:
        yield from _leaves(f"{path}.{name}" if path else str(name), part)
