"""Writing the checkpoints of a trainer's runs, and keeping track of those that failed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dstrain.arguments import TrainingArguments
from dstrain.checkpoint import CheckpointWriter, Policy, RunLock, RunRecord, checkpoint_path
from dstrain.config import ResolvedConfig
from dstrain.core.adapters import has_adapters
from dstrain.core.errors import CheckpointError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, all_or_none
from dstrain.engine import Engine
from dstrain.models import computed_of_parts, weights_hooks_compute_with
from dstrain.trainer.best import BestModel

logger = get_logger(__name__)


class RunCheckpoints:
    """Writes the checkpoints of the run that goes on, or went on last.

    Attributes:
        best: the best model of the run.
        missing: steps whose checkpoints could not be written (``save_failure="continue"``).
        last_save_failed: whether the checkpoint of the last save is one of them.
    """

    best: BestModel

    def __init__(self, ranks: Ranks) -> None:
        """Begin without a run.

        Args:
            ranks: rank and world size of this process.
        """
        self.missing: tuple[int, ...] = ()
        self.last_save_failed = False
        self._ranks = ranks
        self._writer: CheckpointWriter | None = None
        self._lock: RunLock | None = None

    def lock_on(self, folder: Path, *, on_each_node: bool) -> RunLock:
        """Return the lock on an output folder, the same one as long as the folder is the same.

        A trial of a search has an output folder, and so a lock, of its own.
        """
        folder = folder.absolute()
        if self._lock is None or self._lock.folder != folder:
            self._lock = RunLock(folder, on_each_node=on_each_node)
        return self._lock

    @property
    def writes(self) -> bool:
        """Tell whether the run that goes on writes checkpoints."""
        return self._writer is not None

    @property
    def failed(self) -> frozenset[int]:
        """Return the steps of this run whose checkpoints are known to have failed."""
        return frozenset() if self._writer is None else frozenset(self._writer.failed)

    def begin(self, args: TrainingArguments, *, is_read: bool) -> None:
        """Prepare to write the checkpoints of a run, unless ``save_strategy`` is "no".

        A collective.

        Args:
            args: the user's arguments.
            is_read: whether a callback reads checkpoints, which then are complete when it does.

        Raises:
            CheckpointError: another run writes into the same folder.
        """
        self.missing, self.last_save_failed = (), False
        if args.save_strategy != "no":
            self._writer = self._make_writer(args, is_read=is_read)

    def begin_again(self, args: TrainingArguments, *, is_read: bool) -> None:
        """Write the same run's checkpoints in process groups that were formed anew."""
        before = self._writer
        if before is None:
            return
        self._writer = self._make_writer(args, is_read=is_read)
        self._writer.failed, self._writer.last = set(before.failed), before.last

    def save(
        self,
        engine: Engine,
        args: TrainingArguments,
        record: Callable[[], RunRecord],
        *,
        step: int,
        is_read: bool,
    ) -> None:
        """Save a checkpoint of the run as it stands; a collective of all ranks.

        Args:
            engine: of the run.
            args: the user's arguments.
            record: makes what is saved beside the engine's state, once the best model is known.
            step: optimizer steps done.
            is_read: whether a callback reads checkpoints, as in ``begin``.

        Raises:
            CheckpointError: it failed, and ``save_failure`` is "stop".
        """
        if self._writer is None:  # a callback's wish, with save_strategy="no"
            self._writer = self._make_writer(args, is_read=is_read)
        self._writer.wait()  # a checkpoint that failed in the background is not the best one
        folder = checkpoint_path(Path(args.output_dir), step)
        self.best.note_save(folder, failed=self._writer.failed)
        self._writer.save(engine, record())

    def wait(self) -> None:
        """Wait until what is written in the background is committed."""
        if self._writer is not None:
            self._writer.wait()

    def report_missing(self) -> None:
        """Note and log, at the end of a run, which checkpoints could not be written."""
        if self._writer is None:
            return
        self.missing = tuple(sorted(self._writer.failed))
        self.last_save_failed = self._writer.last in self.missing
        if self.missing and self._ranks.is_main:
            logger.error("%s", missing_text(self.missing, last_failed=self.last_save_failed))

    def check_saved(self, step: int, *, steps_before: int) -> None:
        """Check that a run which a signal ended left a checkpoint of its last step.

        Args:
            step: the last step of the run.
            steps_before: step of the checkpoint from which the run resumed.

        Raises:
            CheckpointError: it could not be written, whatever ``save_failure`` is.
        """
        if step in self.failed and step != steps_before:
            raise CheckpointError(
                Problem(
                    f"a signal ended the run after step {step}, which could not be saved",
                    "the reason is in the log",
                    "resume from the last checkpoint",
                )
            )

    def pause(self) -> None:
        """Let go of the process groups, which are about to be formed anew."""
        if self._writer is not None:
            self._writer.close()

    def close(self) -> None:
        """End the run's writer."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _make_writer(self, args: TrainingArguments, *, is_read: bool) -> CheckpointWriter:
        in_background = args.save_async
        if in_background is None and is_read:
            logger.info("checkpoints are written while training waits: a callback has an on_save")
            in_background = False
        folder = Path(args.output_dir)
        policy = Policy(
            output_dir=folder,
            limit=args.save_total_limit,
            only_model=args.save_only_model,
            with_weights=args.save_weights_with_checkpoint or args.save_only_model,
            asynchronous=in_background,
            on_each_node=args.save_on_each_node,
            stop_on_failure=args.save_failure == "stop",
            layout="deepspeed" if args.checkpoint_format == "deepspeed" else "slices",
        )
        lock = self.lock_on(folder, on_each_node=args.save_on_each_node)
        return CheckpointWriter(policy, self._ranks, lock)


def check_hooks(model: torch.nn.Module, args: TrainingArguments, resolved: ResolvedConfig) -> None:
    """Refuse, at stage 3, models whose hooks save tensors that they compute from weights.

    Raises:
        ModelError: the weights will be partitioned when the hooks run.
    """
    saves = args.save_strategy != "no" and (
        args.save_weights_with_checkpoint or args.save_only_model
    )
    if resolved.stage != 3 or not saves or has_adapters(model):
        return
    stay_whole = resolved.buckets.persistence
    if names := weights_hooks_compute_with(model, above=stay_whole):
        raise computed_of_parts(names)


def check_state(engine: Engine, args: TrainingArguments, ranks: Ranks) -> None:
    """Check that checkpoints can hold what the optimizer has made in its first step.

    The first save may be hours later. Where only a signal would ask for a save, this is a warning.
    A collective of all ranks.

    Args:
        engine: the engine after its first step.
        args: the user's arguments.
        ranks: rank and world size of this process.

    Raises:
        CheckpointError: they cannot hold it.
    """
    if args.checkpoint_format == "deepspeed" or args.save_only_model:
        return
    try:
        with all_or_none():
            for shard in engine.state.shards():
                shard.tensor_keys()
    except CheckpointError as error:
        if args.save_strategy != "no":
            raise
        if ranks.is_main:
            logger.warning("a signal will not end this run with a checkpoint: %s", error)


def keep_folder(lock: RunLock, *, takes: bool) -> None:
    """Make sure that the output folder is there for what a run writes last; a collective.

    Args:
        lock: the lock on the output folder.
        takes: whether this rank holds the lock.

    Raises:
        CheckpointError: it was moved or removed, and another run has its place; on every rank.
    """
    with all_or_none():
        if takes:
            lock.keep()


def missing_text(steps: tuple[int, ...], *, last_failed: bool) -> str:
    """Say in one line which checkpoints are missing; return "" where none is.

    Args:
        steps: steps whose checkpoints could not be written.
        last_failed: whether the checkpoint of the last save is among them.
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
