"""Joins a run and its checkpoints: what a trainer saves, and how it takes up a saved run."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstrain.arguments import TrainingArguments
from dstrain.checkpoint import (
    CheckpointWriter,
    Manifest,
    Policy,
    Reader,
    RunLock,
    RunRecord,
    TrainerStateRecord,
    check_readable,
    choose,
    holding,
    load_into,
    place,
    read_arguments,
    read_own,
    read_run,
    read_trainer_state,
    wanted_checkpoint,
)
from dstrain.config import ResolvedConfig
from dstrain.config.explain import as_record
from dstrain.config.placement import Buckets
from dstrain.core.adapters import has_adapters
from dstrain.core.documents import typed
from dstrain.core.errors import CheckpointError, DataError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, all_or_none
from dstrain.core.secrets import is_mask
from dstrain.core.seeds import seed_rank
from dstrain.data import num_shares
from dstrain.engine import Engine, regions
from dstrain.models import computed_of_parts, weights_hooks_compute_with
from dstrain.trainer import build
from dstrain.trainer.position import OwnRecord, Position, Resumption
from dstrain.trainer.processors import processor_writer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dstrain.trainer.trainer import Trainer

logger = get_logger(__name__)


@dataclass(frozen=True)
class Start:
    """A checkpoint that a run will go on from.

    Attributes:
        folder: the checkpoint.
        manifest: its manifest.
        position: where the saved run stood.
        global_batch_size: samples per optimizer step of the saved run.
        state: what it says of the ``TrainerState``.
    """

    folder: Path
    manifest: Manifest
    position: Position
    global_batch_size: int
    state: TrainerStateRecord


def check_hooks(model: Any, args: TrainingArguments, resolved: ResolvedConfig) -> None:
    """Refuse hooks of a model that would save something made of its weights, at stage 3.

    Raises:
        ModelError: they make tensors of weights that will be partitioned, at stage 3.
    """
    saves = args.save_strategy != "no" and (
        args.save_weights_with_checkpoint or args.save_only_model
    )
    if resolved.stage != 3 or not saves or has_adapters(model):
        return
    stay_whole = Buckets.of_config(resolved.values).persistence
    if names := weights_hooks_compute_with(model, above=stay_whole):
        raise computed_of_parts(names)


def find_start(trainer: Trainer, wanted: str | bool | None) -> Start | None:
    """Find and verify the checkpoint to resume from, None to start afresh; a collective.

    Args:
        trainer: whose run it is.
        wanted: what the user passed to ``train``; None takes ``args.resume_from_checkpoint``.

    Raises:
        CheckpointError: there is none that can be used.
    """
    wanted = trainer.args.resume_from_checkpoint if wanted is None else wanted
    wanted = wanted_checkpoint(wanted)
    if wanted is None:
        return None

    looked: dict[Path, Start] = {}

    def look(folder: Path, manifest: Manifest) -> None:
        looked[folder] = _read_start(folder, manifest, trainer.ranks)

    chosen = choose(
        wanted,
        Path(trainer.args.output_dir),
        trainer.ranks,
        on_each_node=trainer.args.save_on_each_node,
        look=look,
    )
    if chosen is None:
        return None
    folder, manifest = chosen
    with all_or_none():
        check_readable(folder, manifest, _reader(trainer))
    start = looked[folder]
    if trainer.args.ignore_data_skip:
        position = start.position
        progress = replace(position.progress, samples_in_epoch=0, steps_in_epoch=0)
        start = replace(start, position=replace(position, progress=progress))
    return start


def _read_start(folder: Path, manifest: Manifest, ranks: Ranks) -> Start:
    """Read what a run resumes from, tensors aside, and check what it will read later.

    Raises:
        CheckpointError: a document is not what it must be.
    """
    run, own = read_run(folder), read_own(folder, manifest, ranks)
    try:
        position = Position.of(run["position"])
        if own is not None:
            typed(own, OwnRecord)
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


def _reader(trainer: Trainer) -> Reader:
    resolved = trainer.resolved
    allowed = trainer.args.checkpoint_format == "deepspeed"
    return Reader(allowed, trainer.ranks.world_size, resolved.stage, resolved.precision)


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


def check_shares(loader: Any, ranks: Ranks, start: Start | None) -> None:
    """Check that every sample is on one rank, and that a run can go on inside of an epoch.

    A collective of all ranks.

    Raises:
        DataError: the data is not the same on all ranks, and cannot be used as it is; or the order
            of what was used of an epoch says nothing of what is left, as ranks have other parts.
    """
    method = "get_train_dataloader"
    if start is None:
        build.check_shared_out(loader, ranks, method=method)
        return
    position = start.position
    build.check_shared_out(
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


def resume(trainer: Trainer, engine: Engine, start: Start) -> Resumption:
    """Load a checkpoint into a fresh engine and the trainer's state; a collective of all ranks.

    Raises:
        CheckpointError: it does not fit the model or the optimizer.
    """
    ranks, position = trainer.ranks, start.position
    with holding(start.folder):
        allowed = _reader(trainer).unpickles
        restored = load_into(engine, start.folder, start.manifest, ranks, unpickles=allowed)
    if position.is_split and restored.own is not None:
        position = replace(position, source=restored.own.get("source"))
    _restore_state(trainer, start)
    batch = trainer.resolved.global_batch_size
    if batch != start.global_batch_size:
        steps = math.ceil(position.progress.samples_in_epoch / batch)
        position = replace(position, progress=replace(position.progress, steps_in_epoch=steps))
    if ranks.is_main:
        logger.warning("resuming from %s, step %d", start.folder, position.progress.step)
        for what, there, here in (
            ("ranks", start.manifest.world_size, ranks.world_size),
            ("ZeRO stage", start.manifest.stage, trainer.resolved.stage),
            ("global batch size", start.global_batch_size, batch),
        ):
            if there != here:
                logger.warning("%s: %s in the checkpoint, %s in this run", what, there, here)
        _warn_of_other_arguments(trainer.state, start.state)
    if restored.own is None:
        seed_rank(trainer.args.seed, step=position.progress.step, rank=ranks.rank)
        if ranks.is_main:
            logger.warning(
                "random states are those of (seed, step, rank) and not of the checkpoint, which "
                "has none for this number of ranks"
            )
    return Resumption(position, restored.own)


def _warn_of_other_arguments(state: Any, saved: TrainerStateRecord) -> None:
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


def _restore_state(trainer: Trainer, start: Start) -> None:
    """Restore what ``TrainerState`` has gathered; its limits and intervals stay this run's."""
    state, saved = trainer.state, start.state
    for name in (
        "global_step",
        "epoch",
        "num_input_tokens_seen",
        "total_flos",
        "log_history",
    ):
        value = getattr(saved, name)
        if value is not None:
            setattr(state, name, value)
    trainer.best.take_up(saved, start.folder)
    if trainer.args.restore_callback_states_from_checkpoint:
        with all_or_none():
            _restore_callbacks(
                trainer.events.handler.callbacks,
                saved.stateful_callbacks or {},
                is_main=trainer.ranks.is_main,
            )


def _restore_callbacks(callbacks: list[Any], saved: Mapping[str, Any], *, is_main: bool) -> None:
    """Give callbacks of the same class their saved state; say which saved ones are not here."""
    for kind, states in saved.items():
        if kind == "TrainerControl":
            continue  # what it tells the loop to do is decided anew
        places = [i for i, c in enumerate(callbacks) if type(c).__name__ == kind]
        for index, state in zip(places, states if isinstance(states, list) else [states]):  # noqa: B905
            callbacks[index] = _restored(callbacks[index], state)
        if not places and is_main:
            logger.warning("the checkpoint has the state of a %s, which this run has not", kind)


def _restored(callback: Any, state: Mapping[str, Any]) -> Any:
    """Make a callback of the same class from a saved state, as ``ExportableState`` does.

    Credentials are not in a checkpoint: they are those of this run's callback.

    Raises:
        CheckpointError: the class cannot take up that state.
    """
    kind = type(callback)
    try:
        arguments = _with_own_credentials(state.get("args", {}), callback)
        restored = kind(**arguments)
        for name, value in _with_own_credentials(state.get("attributes", {}), callback).items():
            # A state holds what an object has for itself, never what its class does.
            if name.startswith("__") or callable(getattr(kind, name, None)):
                raise ValueError(f"{name} is no attribute that a state can set")
            setattr(restored, name, value)
    except Exception as error:  # of the callback's own, which can be any class of a user's
        raise CheckpointError(
            Problem(
                f"the callback {kind.__name__} cannot take up its state in the checkpoint",
                f"{type(error).__name__}: {error}",
                "resume with the callback of the run that wrote it, or leave "
                "restore_callback_states_from_checkpoint out",
            )
        ) from error
    return restored


def _with_own_credentials(saved: Mapping[str, Any], callback: Any) -> dict[str, Any]:
    """Return a callback's saved values, with its present ones where a credential is masked."""
    return {
        name: getattr(callback, name, None) if is_mask(name, value) else value
        for name, value in saved.items()
    }


def make_writer(
    trainer: Trainer, *, wanted: bool = False, before: CheckpointWriter | None = None
) -> CheckpointWriter | None:
    """Make the writer of a run's checkpoints; a collective.

    Args:
        trainer: whose run it is.
        wanted: make one even where ``save_strategy`` is "no".
        before: the writer whose place it takes in the same run: what failed there stays known.

    Returns:
        None where the run writes no checkpoint.

    Raises:
        CheckpointError: another run writes into the same folder.
    """
    args: TrainingArguments = trainer.args
    if args.save_strategy == "no" and not wanted:
        return None
    policy = Policy(
        output_dir=Path(args.output_dir),
        limit=args.save_total_limit,
        only_model=args.save_only_model,
        with_weights=args.save_weights_with_checkpoint or args.save_only_model,
        asynchronous=_in_background(trainer),
        on_each_node=args.save_on_each_node,
        stop_on_failure=args.save_failure == "stop",
        layout="deepspeed" if args.checkpoint_format == "deepspeed" else "slices",
    )
    writer = CheckpointWriter(policy, trainer.ranks, trainer.output_lock)
    if before is not None:
        writer.failed, writer.last = set(before.failed), before.last
    return writer


def lock_on(folder: Path, present: RunLock | None, *, on_each_node: bool) -> RunLock:
    """Return ``present`` where it is the lock on this folder, else a new lock on it.

    A trial of a search has an output folder, and so a lock, of its own.
    """
    folder = folder.absolute()
    if present is not None and present.folder == folder:
        return present
    return RunLock(folder, on_each_node=on_each_node)


def keep_folder(lock: RunLock, *, takes: bool) -> None:
    """Make sure that the output folder is there for what a run writes last; a collective.

    Args:
        lock: on the output folder.
        takes: whether this rank holds it.

    Raises:
        CheckpointError: it was moved or removed, and another run has its place; on every rank.
    """
    with all_or_none():
        if takes:
            lock.keep()


def report_missing(writer: CheckpointWriter | None, ranks: Ranks) -> tuple[tuple[int, ...], bool]:
    """Log at the end of a run which checkpoints could not be written (``save_failure="continue"``).

    Returns:
        Their steps, and whether the checkpoint of the last save is one of them.
    """
    if writer is None:
        return (), False
    failed = tuple(sorted(writer.failed))
    last_failed = writer.last in failed
    if failed and ranks.is_main:
        logger.error("%s", missing_text(failed, last_failed=last_failed))
    return failed, last_failed


def missing_text(steps: tuple[int, ...], *, last_failed: bool) -> str:
    """Say in one line which checkpoints are missing; return "" where none is.

    Args:
        steps: those whose checkpoints could not be written.
        last_failed: whether the checkpoint of the last save is one of them.
    """
    if not steps:
        return ""
    shown = ", ".join(map(str, steps[:8])) + (", ..." if len(steps) > 8 else "")
    last = ", that of the last save among them" if last_failed else ""
    plural = "s" if len(steps) > 1 else ""
    return (
        f"{len(steps)} checkpoint{plural} could not be written (step{plural} {shown}){last}; the "
        "reasons are in the log"
    )


def _in_background(trainer: Trainer) -> bool | None:
    """Return ``save_async``, or False where that is None and a callback reads checkpoints."""
    if trainer.args.save_async is None and trainer.events.read_checkpoints():
        logger.info("checkpoints are written while training waits: a callback has an on_save")
        return False
    return trainer.args.save_async


def save(trainer: Trainer, engine: Engine, writer: CheckpointWriter, position: Position) -> None:
    """Save a checkpoint of the run as it stands; a collective of all ranks.

    Raises:
        CheckpointError: it failed, and ``save_failure`` is "stop".
    """
    writer.wait()  # a checkpoint that failed in the background is not the best one
    folder = place(Path(trainer.args.output_dir), trainer.state.global_step)
    trainer.best.note_save(folder, failed=writer.failed)
    best = trainer.state.best_model_checkpoint
    record = RunRecord(
        step=trainer.state.global_step,
        shared={
            "position": position.shared(),
            "global_batch_size": trainer.resolved.global_batch_size,
        },
        own=position.own(),
        documents={
            "trainer_state.json": _state_values(trainer),
            "resolved_config.json": as_record(trainer.resolved, trainer.args),
            "training_arguments.json": json.loads(trainer.args.to_json_string()),
        },
        write_processor=processor_writer(trainer.processing_class, trainer.data_collator),
        metrics=_last_metrics(trainer.state),
        best=None if best is None else Path(best),
        after_commit=trainer.checkpoint_upload(),
    )
    writer.save(engine, record)


def check_state(trainer: Trainer, engine: Engine) -> None:
    """Check that checkpoints can hold what the optimizer has made in its first step.

    The first save may be hours later. Where only a signal would ask for one, a warning says that
    it will not have it. A collective of all ranks.

    Raises:
        CheckpointError: they cannot.
    """
    args = trainer.args
    if args.checkpoint_format == "deepspeed" or args.save_only_model:
        return
    try:
        with all_or_none():
            for region in regions(engine):
                region.tensor_keys()
    except CheckpointError as error:
        if args.save_strategy != "no":
            raise
        if trainer.ranks.is_main:
            logger.warning("a signal will not end this run with a checkpoint: %s", error)


def check_saved(trainer: Trainer, writer: CheckpointWriter | None, steps_before: int) -> None:
    """Check that a run which a signal ended left a checkpoint of its last step.

    Raises:
        CheckpointError: that one could not be written, whatever ``save_failure`` is.
    """
    step = trainer.state.global_step
    if writer is not None and step in writer.failed and step != steps_before:
        raise CheckpointError(
            Problem(
                f"a signal ended the run after step {step}, which could not be saved",
                "the reason is in the log",
                "resume from the last checkpoint",
            )
        )


def _state_values(trainer: Trainer) -> dict[str, Any]:
    """Make ``trainer_state.json`` as transformers writes it, with the states of callbacks."""
    values = dataclasses.asdict(trainer.state)
    states: dict[str, Any] = {}
    for callback in [*trainer.events.exportable(), trainer.control]:
        name = type(callback).__name__
        if name in states:
            earlier = states[name]
            states[name] = [*(earlier if isinstance(earlier, list) else [earlier])]
            states[name].append(callback.state())
        else:
            states[name] = callback.state()
    values["stateful_callbacks"] = states
    return values


def _last_metrics(state: Any) -> dict[str, float]:
    """Return the metrics of the evaluation at this very step, of all sets if there are several."""
    metrics: dict[str, float] = {}
    for entry in reversed(state.log_history):
        if entry.get("step") != state.global_step:
            break
        metrics = {k: v for k, v in entry.items() if k.startswith("eval_")} | metrics
    return metrics
