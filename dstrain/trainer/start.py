"""Finding, checking and loading the checkpoint from which a run resumes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dstrain.arguments import TrainingArguments
from dstrain.checkpoint import (
    Manifest,
    Reader,
    TrainerStateRecord,
    check_readable,
    choose_checkpoint,
    holding,
    load_into,
    read_arguments,
    read_rank_state,
    read_run,
    read_trainer_state,
    wanted_checkpoint,
)
from dstrain.config import ResolvedConfig
from dstrain.core.documents import typed
from dstrain.core.errors import CheckpointError, DataError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, all_or_none
from dstrain.core.seeds import seed_rank
from dstrain.data import num_shares
from dstrain.engine import Engine
from dstrain.trainer import loaders
from dstrain.training.resume import Position, RankRecord, Resumption

if TYPE_CHECKING:
    from transformers import TrainerState

logger = get_logger(__name__)


@dataclass(frozen=True)
class Start:
    """Describes the checkpoint from which a run resumes.

    Attributes:
        folder: the checkpoint.
        manifest: its manifest.
        position: the position of the saved run.
        global_batch_size: samples per optimizer step of the saved run.
        state: its ``TrainerState``.
    """

    folder: Path
    manifest: Manifest
    position: Position
    global_batch_size: int
    state: TrainerStateRecord


def find_start(
    args: TrainingArguments, wanted: str | bool | None, ranks: Ranks, reader: Reader
) -> Start | None:
    """Find and verify the checkpoint to resume from, None to start afresh; a collective.

    Args:
        args: the user's arguments.
        wanted: what the user passed to ``train``; None takes ``args.resume_from_checkpoint``.
        ranks: this process among the others.
        reader: what this run can read.

    Raises:
        CheckpointError: there is none that can be used.
    """
    wanted = wanted_checkpoint(args.resume_from_checkpoint if wanted is None else wanted)
    if wanted is None:
        return None

    looked: dict[Path, Start] = {}

    def inspect(folder: Path, manifest: Manifest) -> None:
        looked[folder] = _read_start(folder, manifest, ranks)

    chosen = choose_checkpoint(
        wanted, Path(args.output_dir), ranks, on_each_node=args.save_on_each_node, inspect=inspect
    )
    if chosen is None:
        return None
    folder, manifest = chosen
    with all_or_none():
        check_readable(folder, manifest, reader)
    start = looked[folder]
    if args.ignore_data_skip:
        position = start.position
        progress = replace(position.progress, samples_in_epoch=0, steps_in_epoch=0)
        start = replace(start, position=replace(position, progress=progress))
    return start


def reader_for(args: TrainingArguments, resolved: ResolvedConfig) -> Reader:
    """Return what a run of these arguments can read."""
    allowed = args.checkpoint_format == "deepspeed"
    return Reader(allowed, resolved.facts.world_size, resolved.stage, resolved.precision)


def _read_start(folder: Path, manifest: Manifest, ranks: Ranks) -> Start:
    """Read what a run resumes from, tensors aside, and check what it will read later.

    Raises:
        CheckpointError: a document is not what it must be.
    """
    run, rank_state = read_run(folder), read_rank_state(folder, manifest, ranks)
    try:
        position = Position.of(run["position"])
        if rank_state is not None:
            typed(rank_state, RankRecord)
    except ValueError as error:
        raise CheckpointError(
            Problem(
                f"the state of the run in {folder} cannot be read",
                str(error),
                "use another checkpoint",
            )
        ) from error
    read_arguments(folder)
    state = read_trainer_state(folder)
    return Start(folder, manifest, position, run["global_batch_size"], state)


def steps_in_all(start: Start, *, max_steps: int, per_epoch: int | None, batch: int) -> int:
    """Count the steps of the whole run when it goes on with global batches of ``batch`` samples.

    Where the length of the run follows from epochs, steps done with another batch count as they
    were, and the rest of the data is what is left to do.
    """
    if batch == start.global_batch_size or per_epoch is None:
        return max_steps
    progress = start.position.progress
    done = progress.epoch * per_epoch + math.ceil(progress.samples_in_epoch / batch)
    return progress.step + max(0, max_steps - done)


def check_shares(loader: object, ranks: Ranks, start: Start | None) -> None:
    """Check that every sample is on one rank, and that a run can go on inside of an epoch.

    A collective of all ranks.

    Raises:
        DataError: the data is not the same on all ranks, and cannot be used as it is; or the order
            of what was used of an epoch says nothing of what is left, as ranks have other parts.
    """
    method = "get_train_dataloader"
    if start is None:
        loaders.check_shared_out(loader, ranks, method=method)
        return
    position = start.position
    loaders.check_shared_out(
        loader,
        ranks,
        method=method,
        epoch=position.progress.epoch + position.epoch_is_over,
        known_whole=position.is_inside_epoch
        and position.shares == 1
        and position.source is not None
        and start.manifest.world_size > 1,  # one rank alone cannot tell
    )
    there, here = position.shares or 1, num_shares(loader)
    if there == here:
        return
    said = [f"{n} parts, one for each rank" if n > 1 else "whole" for n in (there, here)]
    what = f"the data came {said[0]} in the checkpoint, and comes {said[1]} in this run"
    if position.is_inside_epoch:
        raise DataError(
            Problem(
                what,
                "what is left of an epoch is another in each part",
                f"resume on {start.manifest.world_size} ranks with the data split as then; or set "
                "ignore_data_skip, which begins the epoch anew",
            )
        )
    if ranks.is_main:
        logger.warning("%s: samples come in another order", what)


def num_epochs(args: TrainingArguments) -> int | None:
    """Return the epochs after which a run ends, however many steps these had; None: by steps alone.

    A callback may end epochs early, and the length that a stream states may be wrong.
    """
    return math.ceil(args.num_train_epochs) if args.max_steps <= 0 else None


def load(
    engine: Engine,
    start: Start,
    ranks: Ranks,
    resolved: ResolvedConfig,
    *,
    seed: int,
    unpickles: bool,
) -> Resumption:
    """Load a checkpoint into a fresh engine; a collective of all ranks.

    Args:
        engine: of this run.
        start: the checkpoint.
        ranks: this process among the others.
        resolved: of this run.
        seed: of random states that the checkpoint does not have.
        unpickles: whether DeepSpeed's loader may be used, which executes pickles.

    Raises:
        CheckpointError: it does not fit the model or the optimizer.
    """
    position = start.position
    with holding(start.folder):
        restored = load_into(engine, start.folder, start.manifest, ranks, unpickles=unpickles)
    if position.is_split and restored.rank_state is not None:
        position = replace(position, source=restored.rank_state.get("source"))
    batch = resolved.global_batch_size
    if batch != start.global_batch_size:
        steps = math.ceil(position.progress.samples_in_epoch / batch)
        position = replace(position, progress=replace(position.progress, steps_in_epoch=steps))
    if ranks.is_main:
        logger.warning("resuming from %s, step %d", start.folder, position.progress.step)
        for what, there, here in (
            ("ranks", start.manifest.world_size, ranks.world_size),
            ("ZeRO stage", start.manifest.stage, resolved.stage),
            ("global batch size", start.global_batch_size, batch),
        ):
            if there != here:
                logger.warning("%s: %s in the checkpoint, %s in this run", what, there, here)
    if restored.rank_state is None:
        seed_rank(seed, step=position.progress.step, rank=ranks.rank)
        if ranks.is_main:
            logger.warning(
                "random states are those of (seed, step, rank) and not of the checkpoint, which "
                "has none for this number of ranks"
            )
    return Resumption(position, restored.rank_state)


def restore_state(state: TrainerState, saved: TrainerStateRecord) -> None:
    """Restore what ``TrainerState`` has gathered; its limits and intervals stay this run's."""
    for name in ("global_step", "epoch", "num_input_tokens_seen", "total_flos", "log_history"):
        value = getattr(saved, name)
        if value is not None:
            setattr(state, name, value)


def warn_of_other_arguments(state: TrainerState, saved: TrainerStateRecord) -> None:
    """Name the arguments that transformers compares on a resume, where they differ.

    In optimizer steps, whether an argument was a number of them or a share: both states say what
    became of the arguments of their run.
    """
    compared = {
        "logging_steps": "logging_steps",
        "eval_steps": "eval_steps",
        "save_steps": "save_steps",
        "train_batch_size": "per_device_train_batch_size",
    }
    for name, argument in compared.items():
        there, here = getattr(saved, name), getattr(state, name)
        if None not in (there, here) and there != here:
            logger.warning("%s: %g in the checkpoint, %g in this run", argument, there, here)
