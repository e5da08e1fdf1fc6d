"""Reading a checkpoint into an engine of any topology: each rank reads what its regions need."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dstrain.checkpoint import content
from dstrain.checkpoint.codec import decode
from dstrain.checkpoint.manifest import Manifest
from dstrain.checkpoint.native import Reader, check_readable, tag_of
from dstrain.core.errors import CheckpointError, Problem, raise_problems
from dstrain.core.ranks import Ranks, all_or_none
from dstrain.engine import (
    MASTER,
    WEIGHT,
    Engine,
    Region,
    Slot,
    begin_load,
    create_state,
    finish_load,
    load_native,
    optimized_names,
    read_progress,
    regions,
    slots_of,
    write_progress,
)
from dstrain.models import TensorReader

# Slices are read in pieces of this many elements: what loading takes beyond the engine itself.
_CHUNK_NUMEL = 8 * 2**20


@dataclass(frozen=True)
class Piece:
    """A run of one parameter's values under one key, as it stands in a file."""

    start: int
    numel: int
    path: Path


@dataclass(frozen=True)
class SliceIndex:
    """Where all slices of a checkpoint are.

    Attributes:
        pieces: (key, parameter) -> pieces in order of their start.
        scalars: parameter -> single numbers of its optimizer state; those that had state without
            numbers are there with an empty dict.
    """

    pieces: dict[tuple[str, str], list[Piece]]
    scalars: dict[str, dict[str, Any]]

    def keys_of(self, name: str) -> list[str]:
        """Keys that a parameter has."""
        return [key for key, parameter in self.pieces if parameter == name]

    def missing(self, key: str, name: str, start: int, stop: int) -> int:
        """Elements from ``start`` to ``stop`` that no piece has."""
        reached, missing = start, 0
        for piece in self.pieces.get((key, name), []):
            low, high = max(piece.start, reached), min(piece.start + piece.numel, stop)
            if low < high:
                missing += low - reached
                reached = high
        return missing + stop - reached


@dataclass(frozen=True)
class Restored:
    """What a checkpoint gives back to the trainer.

    Attributes:
        shared: ``RunRecord.shared``.
        own: ``RunRecord.own`` of this rank; None where another number of ranks wrote it, or an
            import.
    """

    shared: dict[str, Any]
    own: dict[str, Any] | None


def read_index(folder: Path, manifest: Manifest) -> SliceIndex:
    """Read the headers of all slice files; no tensor is touched.

    Raises:
        CheckpointError: the checkpoint has no slices, or a file is damaged.
    """
    if manifest.resumable and not manifest.has_slices:
        raise CheckpointError(
            Problem(
                f"{folder} is in DeepSpeed's own layout",
                "it has no slices by parameter name",
                f"make it one that has: dstrain checkpoint import {folder} OUT",
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
        if content.slice_file(rank) in absent:
            continue
        path = folder / content.slice_file(rank)
        with reading(path) as file:
            sizes = {name: file.numel(name) for name in file.keys()}  # noqa: SIM118
            spans, numbers_of = (_mapping(path, file.metadata, k) for k in ("spans", "scalars"))
        for name, numbers in numbers_of.items():
            held = scalars.setdefault(name, {})
            for key, value in numbers.items():
                held[key] = max(held.get(key, value), value)
        for tensor, size in sizes.items():
            key, _, name = tensor.partition("/")
            start, numel = spans.get(name, (0, -1))
            if size != numel:
                raise CheckpointError(
                    Problem(f"{path} has {size} elements of {tensor}, its spans say {numel}")
                )
            pieces.setdefault((key, name), []).append(Piece(start, numel, path))
            if key not in (MASTER, WEIGHT):
                scalars.setdefault(name, {})
    for found in pieces.values():
        found.sort(key=lambda piece: piece.start)
    return SliceIndex(pieces, scalars)


def check_coverage(index: SliceIndex, manifest: Manifest) -> list[str]:
    """Parameters whose slices do not add up to the whole, or to more, a line each."""
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


def load_into(
    engine: Engine, folder: Path, manifest: Manifest, ranks: Ranks, *, unpickles: bool = False
) -> Restored:
    """Put a checkpoint into a fresh engine; a collective of all ranks.

    Only what overlaps this rank's regions is read, some 32 MB at a time. Where the checkpoint
    is in DeepSpeed's own layout, DeepSpeed reads it, which executes its pickles.

    Args:
        engine: a fresh one.
        folder: the checkpoint.
        manifest: its manifest.
        ranks: facts of this process.
        unpickles: whether the user allowed DeepSpeed's layout.

    Raises:
        CheckpointError: it does not fit the model or the optimizer; the weights are as they were.
    """
    with all_or_none():
        reader = Reader(
            unpickles, ranks.world_size, engine.resolved.stage, engine.resolved.precision
        )
        check_readable(folder, manifest, reader)
        index = read_index(folder, manifest) if manifest.has_slices else None
        problems = misfits(engine, folder, manifest, index, ranks)
        raise_problems(problems, error=CheckpointError, title="the checkpoint misfits")
        shared = _read_json(folder / content.RUN)
        own = None
        name = content.rank_file(ranks.rank)
        written = name in manifest.files or name in manifest.elsewhere
        if manifest.world_size == ranks.world_size and written:
            own = _read_json(folder / name)
        if index is None:
            _check_optimizer(engine, shared["engine"]["optimizer"])
    if index is None:
        load_native(engine, folder, tag_of(manifest.step))
        with all_or_none():
            load_buffers(engine, folder, manifest, ranks)
    else:
        _load_slices(engine, folder, manifest, index, ranks)
    write_progress(engine, shared.pop("engine"))
    return Restored(shared, own)


def _load_slices(
    engine: Engine, folder: Path, manifest: Manifest, index: SliceIndex, ranks: Ranks
) -> None:
    begin_load(engine)
    with all_or_none():
        held = regions(engine)
        create_state(held, index.scalars)
        _check_state(held, index)
        if manifest.elsewhere:
            check_here(held, index, folder)
        read_regions(held, index)
        load_buffers(engine, folder, manifest, ranks)
    finish_load(engine)


def _check_optimizer(engine: Engine, there: str) -> None:
    """DeepSpeed would put the state of one optimizer into another without a word."""
    here = read_progress(engine)["optimizer"]
    if here != there:
        raise CheckpointError(
            Problem(
                f"the checkpoint has the state of {there}, this run's optimizer is {here}",
                "in DeepSpeed's own layout the two cannot be told apart by names",
                f"use {there}, or start from the weights",
            )
        )


def misfits(
    engine: Engine, folder: Path, manifest: Manifest, index: SliceIndex | None, ranks: Ranks
) -> list[Problem]:
    """What keeps a checkpoint from being loaded into this engine."""
    here, there = content.parameter_shapes(engine), manifest.parameters
    problems = []
    for title, names in (
        ("only this model has", sorted(set(here) - set(there))),
        ("only the checkpoint has", sorted(set(there) - set(here))),
    ):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
            problems.append(
                Problem(f"parameters that {title}: {shown}", "", "resume with the same model")
            )
    for name in sorted(set(here) & set(there)):
        if tuple(here[name]) != tuple(there[name]):
            problems.append(
                Problem(
                    f"{name} has shape {tuple(here[name])}, in the checkpoint {tuple(there[name])}",
                    "",
                    "resume with the same model",
                )
            )
    changed = sorted(set(optimized_names(engine)) ^ set(manifest.optimized))
    # Whether DeepSpeed counts one without elements as trained depends on the stage.
    changed = [name for name in changed if torch.Size(here.get(name, ())).numel()]
    if changed and not problems:
        problems.append(
            Problem(
                f"{len(changed)} parameters are trained in only one of the two runs: {changed[0]}",
                "they were frozen or unfrozen since",
                "resume with the same parameters frozen",
            )
        )
    problems += _misfitting_buffers(engine, folder, manifest, ranks)
    if not problems and index is not None and not manifest.not_in(folder):
        problems = [Problem(line) for line in check_coverage(index, manifest)]
    return problems


def check_here(
    held: Sequence[Region], index: SliceIndex, folder: Path, *, values_only: bool = False
) -> None:
    """A folder that other machines have parts of must have all that this rank needs.

    Raises:
        CheckpointError: it has not.
    """
    for region in held:
        for key in [region.value_key] if values_only else region.tensor_keys():
            if missing := index.missing(key, region.name, region.start, region.stop):
                raise CheckpointError(
                    Problem(
                        f"{folder} lacks {missing} values of {region.name} that this rank needs",
                        "it was saved with save_on_each_node, and another machine has them",
                        "start as many ranks on each machine as then, at the same ZeRO stage; or "
                        "copy the files in state/ of all machines into this folder",
                    )
                )


def _check_state(held: Sequence[Region], index: SliceIndex) -> None:
    """The optimizer here must have use for the saved state, and find what it needs."""
    for region in held:
        if region.optimizer is None or region.name not in index.scalars:
            continue
        here, there = set(region.tensor_keys()), set(index.keys_of(region.name))
        # DeepSpeed's CPU Lion and Adagrad carry a moment that they never use.
        if here - there:
            raise CheckpointError(
                Problem(
                    f"{type(region.optimizer).__name__} needs {sorted(here - there)}",
                    f"the checkpoint has {sorted(there)} of {region.name}: another optimizer "
                    "wrote it",
                    "resume with that optimizer, or start from the weights alone with "
                    "model_name_or_path",
                )
            )


def read_regions(held: Sequence[Region], index: SliceIndex, *, values_only: bool = False) -> None:
    """Read what overlaps the regions, from each file in turn, some 32 MB at a time.

    Args:
        held: all regions of this rank.
        index: of the checkpoint.
        values_only: leave the optimizer's state out.
    """
    for path, reads in _by_file(held, index, values_only=values_only).items():
        with reading(path) as file:
            for region, key, low, high, piece in reads:
                for start in range(low, high, _CHUNK_NUMEL):
                    stop = min(high, start + _CHUNK_NUMEL)
                    place = f"{key}/{region.name}", start - piece.start, stop - piece.start
                    region.write(key, start, file.read(*place))


def _by_file(
    held: Sequence[Region], index: SliceIndex, *, values_only: bool
) -> dict[Path, list[tuple[Region, str, int, int, Piece]]]:
    """What to read from each file, so that each is opened once."""
    reads: dict[Path, list[tuple[Region, str, int, int, Piece]]] = {}
    for region in held:
        for key in [region.value_key] if values_only else region.tensor_keys():
            for piece in index.pieces.get((key, region.name), []):
                low = max(piece.start, region.start)
                high = min(piece.start + piece.numel, region.stop)
                if low < high:
                    reads.setdefault(piece.path, []).append((region, key, low, high, piece))
    return reads


def load_buffers(engine: Engine, folder: Path, manifest: Manifest, ranks: Ranks) -> None:
    """Put the saved buffers into the module: the main rank's, then what this rank had for itself.

    Another number of ranks takes what the main rank had for itself. Ranks read the same files.
    """
    there = {slot.name: slot for slot in slots_of(engine.module)}
    own = _own_buffers(manifest, ranks)
    for name in (content.BUFFERS, content.OTHER_BUFFERS, own):
        if not _has(folder, manifest, name):
            continue
        with reading(folder / name) as file:
            for buffer in file.keys():  # noqa: SIM118 - a file is no dict
                fits = name == own or buffer not in there
                if buffer in there and (fits or file.shape(buffer) == _shape(there[buffer])):
                    there[buffer].put(file.whole(buffer))
    engine.buffers.begin()


def _own_buffers(manifest: Manifest, ranks: Ranks) -> str:
    """The file of what a rank had for itself: this one, or the main one of other ranks."""
    same = manifest.world_size == ranks.world_size
    return content.buffer_file(ranks.rank if same else 0)


def _has(folder: Path, manifest: Manifest, name: str) -> bool:
    """Whether a checkpoint has a file, perhaps one of another machine that was copied here."""
    listed = name in manifest.files or name in manifest.elsewhere
    return listed and (folder / name).exists()


def _shape(slot: Slot) -> tuple[int, ...]:
    return tuple(slot.tensor.shape)


def _misfitting_buffers(
    engine: Engine, folder: Path, manifest: Manifest, ranks: Ranks
) -> list[Problem]:
    """Buffers of another shape than the model has, unless a rank had that for itself."""
    there = {slot.name: slot for slot in slots_of(engine.module)}
    own: set[str] = set()
    if _has(folder, manifest, _own_buffers(manifest, ranks)):
        with reading(folder / _own_buffers(manifest, ranks)) as file:
            own = set(file.keys())
    problems = []
    for name in (content.BUFFERS, content.OTHER_BUFFERS):
        if not _has(folder, manifest, name):
            continue
        with reading(folder / name) as file:
            for buffer in file.keys():  # noqa: SIM118 - a file is no dict
                if buffer not in there or buffer in own:
                    continue
                here, saved = _shape(there[buffer]), file.shape(buffer)
                if here != saved:
                    problems.append(
                        Problem(
                            f"the buffer {buffer} has shape {here}, in the checkpoint {saved}",
                            "",
                            "resume with the same model",
                        )
                    )
    return problems


def read_run(folder: Path) -> dict[str, Any]:
    """``RunRecord.shared`` and the engine's progress, before there is an engine.

    Raises:
        CheckpointError: the file is damaged.
    """
    return _read_json(folder / content.RUN)


def _read_json(path: Path) -> Any:
    try:
        return decode(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            Problem(f"{path} cannot be read", str(error), "use another checkpoint")
        ) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[TensorReader]:
    """An open file of slices.

    Raises:
        CheckpointError: it is damaged or not there.
    """
    try:
        with TensorReader(path) as file:
            yield file
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            Problem(f"{path} cannot be read", str(error), "use another checkpoint")
        ) from error


def _mapping(path: Path, metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    found = json.loads(metadata.get(name, "null"))
    if not isinstance(found, dict):
        raise CheckpointError(Problem(f"{path} does not say its {name}", "it is no file of slices"))
    return found


def opened(path: Path) -> Any:
    """A memory-mapped safetensors file, as a context.

    Raises:
        CheckpointError: it is damaged or not there.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            Problem(f"{path} cannot be read", str(error), "use another checkpoint")
        ) from error
