"""Loading a checkpoint into an engine of any topology; each rank reads only its own shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dstrain.checkpoint import content
from dstrain.checkpoint.buffer_files import (
    load_buffers,
    load_shared_buffers,
    misfitting_buffers,
    reshaped_in,
)
from dstrain.checkpoint.extra_state import EXTRA_STATES, put_extra_states, states_for
from dstrain.checkpoint.files import reading
from dstrain.checkpoint.loading_code import call_loading_code
from dstrain.checkpoint.manifest import DEEPSPEED, Manifest
from dstrain.checkpoint.native import Reader, unpickling
from dstrain.checkpoint.run_files import read_rank_state, read_run
from dstrain.checkpoint.slice_index import Piece, SliceIndex, check_coverage, read_index
from dstrain.core.errors import CheckpointError, Problem, raise_problems
from dstrain.core.ranks import Ranks, all_or_none
from dstrain.engine import Engine, StateShard

# Slices are read in pieces of this many elements, which bounds the extra memory of loading.
_CHUNK_NUMEL = 8 * 2**20


@dataclass(frozen=True)
class Restored:
    """State of the trainer, restored from a checkpoint.

    Attributes:
        shared: ``RunRecord.shared``.
        rank_state: ``RunRecord.rank_state`` of this rank; None for an imported checkpoint, and
            where another number of ranks wrote the checkpoint.
    """

    shared: dict[str, Any]
    rank_state: dict[str, Any] | None


def load_into(
    engine: Engine, folder: Path, manifest: Manifest, ranks: Ranks, *, unpickles: bool = False
) -> Restored:
    """Load a checkpoint into a new engine; a collective of all ranks.

    Each rank reads only the elements of its own shards, some 32 MB at a time. A checkpoint in
    DeepSpeed's own layout is read by DeepSpeed, which executes its pickles.

    Args:
        engine: a new engine.
        folder: the checkpoint.
        manifest: its manifest.
        ranks: facts of this process.
        unpickles: whether the user allowed DeepSpeed's layout.

    Returns:
        The trainer's state.

    Raises:
        CheckpointError: the checkpoint does not fit the model or the optimizer; the engine's
            weights are then unchanged.
    """
    native, index = None, None
    with all_or_none():
        if manifest.layout == DEEPSPEED:
            reader = Reader(
                unpickles, ranks.world_size, engine.resolved.stage, engine.resolved.precision
            )
            native = unpickling(folder, manifest, reader)
        else:
            index = read_index(folder, manifest)
        shared = read_run(folder)
        rank_state = read_rank_state(folder, manifest, ranks)
        reshaped = reshaped_in(shared, engine)
        problems = misfits(engine, folder, manifest, index, ranks, reshaped=reshaped)
        raise_problems(problems, error=CheckpointError, title="the checkpoint misfits")
        if native is not None:
            _check_optimizer(engine, shared["engine"]["optimizer"])
            load_shared_buffers(engine, folder, manifest)
    if native is not None:
        engine.state.load_native(native)
    else:
        assert index is not None
        _load_slices(engine, folder, manifest, index)
    with all_or_none():
        load_buffers(engine, folder, manifest, ranks, reshaped=reshaped)
        put_extra_states(engine.module, states_for(shared, rank_state))
    # DeepSpeed calls load_state_dict itself, except at stage 3, where weights are partitioned.
    if native is None or engine.resolved.stage == 3:
        changed = call_loading_code(engine, ranks)
        if changed and index is not None:
            _load_values(engine, index)
    engine.state.restore_progress(shared.pop("engine"))
    for document in (shared, rank_state or {}):
        document.pop(EXTRA_STATES, None)
    return Restored(shared, rank_state)


def _load_slices(engine: Engine, folder: Path, manifest: Manifest, index: SliceIndex) -> None:
    with engine.state.loading(index.scalars) as held:
        _check_state(held, index)
        if manifest.elsewhere:
            check_local_slices(held, index, folder)
        read_shards(held, index)


def _load_values(engine: Engine, index: SliceIndex) -> None:
    """Read the weights into the engine again, after loading code of the model changed them."""
    with engine.state.loading() as held:
        read_shards(held, index, values_only=True)


def _check_optimizer(engine: Engine, there: str) -> None:
    """Refuse the state of another optimizer, which DeepSpeed would load without an error."""
    here = engine.state.optimizer_name
    if here != there:
        raise CheckpointError(
            Problem(
                f"the checkpoint has the state of {there}, this run's optimizer is {here}",
                "in DeepSpeed's own layout the two cannot be told apart by names",
                f"use {there}, or start from the weights",
            )
        )


def misfits(
    engine: Engine,
    folder: Path,
    manifest: Manifest,
    index: SliceIndex | None,
    ranks: Ranks,
    *,
    reshaped: Iterable[str],
) -> list[Problem]:
    """List the problems that prevent loading a checkpoint into this engine.

    Args:
        engine: the engine.
        folder: the checkpoint.
        manifest: its manifest.
        index: index of its slices; None where it has none.
        ranks: facts of this process.
        reshaped: names of buffers whose shape training has changed and may differ from the model's.
    """
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
    changed = sorted(set(engine.state.optimized_names()) ^ set(manifest.optimized))
    # DeepSpeed counts parameters without elements as trained at some stages only.
    changed = [name for name in changed if torch.Size(here.get(name, ())).numel()]
    if changed and not problems:
        problems.append(
            Problem(
                f"{len(changed)} parameters are trained in only one of the two runs: {changed[0]}",
                "they were frozen or unfrozen since",
                "resume with the same parameters frozen",
            )
        )
    problems += misfitting_buffers(engine, folder, manifest, ranks, reshaped=reshaped)
    if not problems and index is not None and not manifest.not_in(folder):
        problems = [Problem(line) for line in check_coverage(index, manifest)]
    return problems


def check_local_slices(
    held: Sequence[StateShard], index: SliceIndex, folder: Path, *, values_only: bool = False
) -> None:
    """Check that this machine's folder has all slices that this rank needs.

    Raises:
        CheckpointError: slices are missing.
    """
    for shard in held:
        for key in [shard.value_key] if values_only else shard.tensor_keys():
            if missing := index.missing(key, shard.name, shard.start, shard.stop):
                raise CheckpointError(
                    Problem(
                        f"{folder} lacks {missing} values of {shard.name} that this rank needs",
                        "it was saved with save_on_each_node, and another machine has them",
                        "start as many ranks on each machine as then, at the same ZeRO stage; or "
                        "copy the files in state/ of all machines into this folder",
                    )
                )


def _check_state(held: Sequence[StateShard], index: SliceIndex) -> None:
    """Check that the saved state has every tensor that this run's optimizer needs."""
    for shard in held:
        if shard.optimizer is None or shard.name not in index.scalars:
            continue
        here, there = set(shard.tensor_keys()), set(index.keys_of(shard.name))
        # A tensor that only the checkpoint has is no error: DeepSpeed's CPU Lion and Adagrad carry
        # a moment that they never use.
        if here - there:
            raise CheckpointError(
                Problem(
                    f"{type(shard.optimizer).__name__} needs {sorted(here - there)}",
                    f"the checkpoint has {sorted(there)} of {shard.name}: another optimizer "
                    "wrote it",
                    "resume with that optimizer, or start from the weights alone with "
                    "model_name_or_path",
                )
            )


def read_shards(
    held: Sequence[StateShard], index: SliceIndex, *, values_only: bool = False
) -> None:
    """Read the elements of the shards from the slice files, file by file, some 32 MB at a time.

    Args:
        held: all shards of this rank.
        index: index of the checkpoint's slices.
        values_only: leave the optimizer's state out.
    """
    for path, reads in reads_by_file(held, index, values_only=values_only).items():
        with reading(path) as file:
            for shard, key, low, high, piece in reads:
                for start in range(low, high, _CHUNK_NUMEL):
                    stop = min(high, start + _CHUNK_NUMEL)
                    place = f"{key}/{shard.name}", start - piece.start, stop - piece.start
                    shard.write(key, start, file.read(*place))


def reads_by_file(
    held: Sequence[StateShard], index: SliceIndex, *, values_only: bool = False
) -> dict[Path, list[tuple[StateShard, str, int, int, Piece]]]:
    """Group the ranges to read by file, so that each file is opened once.

    Returns:
        For each file, the shard, the key, first and last element (exclusive), and the piece.
    """
    reads: dict[Path, list[tuple[StateShard, str, int, int, Piece]]] = {}
    for shard in held:
        for key in [shard.value_key] if values_only else shard.tensor_keys():
            for piece in index.pieces(key, shard.name, shard.start, shard.stop):
                low = max(piece.start, shard.start)
                high = min(piece.start + piece.numel, shard.stop)
                if low < high:
                    reads.setdefault(piece.path, []).append((shard, key, low, high, piece))
    return reads
