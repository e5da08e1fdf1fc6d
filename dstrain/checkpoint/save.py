"""Saving of checkpoints: copying, writing and committing on all ranks, and handling of failures."""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dstrain.checkpoint import folders
from dstrain.checkpoint.capture import Captured, ContentCapture
from dstrain.checkpoint.manifest import DEEPSPEED, write_manifest
from dstrain.checkpoint.policy import Policy, RunRecord
from dstrain.checkpoint.run_lock import RunLock
from dstrain.checkpoint.staging import Staging, new_staging
from dstrain.checkpoint.writers import Writers, files_by_folder
from dstrain.core.errors import CheckpointError, DstrainError, Problem
from dstrain.core.files import FileRecord
from dstrain.core.log import get_logger
from dstrain.core.ranks import (
    PATIENCE,
    Ranks,
    all_or_none,
    gather_failures,
    gather_objects,
    is_distributed,
    on_any_rank,
)
from dstrain.engine import Engine
from dstrain.models import HostCopies

logger = get_logger(__name__)


@dataclass
class _Save:
    """Save in progress, whose content training no longer changes.

    Attributes:
        captured: the content to write.
        staging: the staging folder, known to the rank that made it.
        held: on closing, removes the folder unless it has been committed.
    """

    captured: Captured
    staging: Staging
    held: contextlib.ExitStack


class CheckpointWriter:
    """Writer of a run's checkpoints; every method is a collective of all ranks.

    Attributes:
        failed: steps whose checkpoints could not be written, as known so far.
        last: step of the latest call of ``save``; None before the first.
    """

    def __init__(self, policy: Policy, ranks: Ranks, lock: RunLock) -> None:
        """Lock the folder and clean up after killed runs.

        Args:
            policy: the run's settings for saving.
            ranks: facts of this process.
            lock: the run's lock on the folder, which the writer holds until it is closed.

        Raises:
            CheckpointError: another run is writing into the folder.
        """
        self._policy, self._ranks = policy, ranks
        self._writers = Writers.of(policy, ranks)
        self._capture = ContentCapture(policy, self._writers)
        self._held = contextlib.ExitStack()
        self._lock = lock
        with all_or_none():
            if self._writers.sharers.is_main:
                self._held.enter_context(lock.held())
                folders.recover(policy.output_dir)
        self._asynchronous = False if policy.layout == DEEPSPEED else policy.asynchronous
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._failures: list[str] = []
        self._writing: int | None = None
        self.failed: set[int] = set()
        self.last: int | None = None
        self._group: Any = None
        if is_distributed():
            import torch.distributed as dist

            # A separate group: collectives of writing threads must not mix with training's.
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def save(self, engine: Engine, record: RunRecord) -> None:
        """Save the engine's state and ``record`` as ``checkpoint-<step>``.

        Waits first for a background save that is still being written. A save in the background
        returns once this rank's slices are copied.

        Raises:
            CheckpointError: the optimizer's state cannot be saved; or this save, or the background
                save before it, failed and the policy stops the run on failures.
        """
        self.wait()
        self.last = record.step
        with all_or_none():
            if self._writers.sharers.is_main:
                self._lock.keep()
        if self._asynchronous is None:
            self._asynchronous = self._capture.copies_fit(engine)
        failures = self._begin(engine, record)
        if self._thread is not None:
            return
        if failures and self._lost_folder():
            failures = self._begin(engine, record)
            if self._thread is not None:
                return
        self._conclude(failures, record.step)

    def _begin(self, engine: Engine, record: RunRecord) -> list[str]:
        """Save, or start a save in the background; return failures so far, alike on all ranks."""
        try:
            save = self._prepare(engine, record, self._copies if self._asynchronous else None)
        except DstrainError as error:
            if isinstance(error, CheckpointError):
                raise
            return [str(error)]
        if not self._asynchronous:
            return self._finish(save)
        self._writing = record.step
        self._thread = threading.Thread(
            target=self._finish_in_thread, args=(save,), name="checkpoint"
        )
        self._thread.start()
        return []

    def _lost_folder(self) -> bool:
        """Tell whether the output folder was moved or removed during a save; a collective.

        That is no failure of the disk: this call makes the folder anew, and it can be written.
        """
        lost = False
        with all_or_none():
            if self._writers.sharers.is_main:
                lost = self._lock.keep()
        return on_any_rank(lost)

    def wait(self) -> None:
        """Wait until a background save has ended.

        Raises:
            CheckpointError: the save failed and the policy stops the run on failures.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failures, self._failures = self._failures, []
        assert self._writing is not None
        # Training has gone on meanwhile: for a moved folder this checkpoint is lost, not the run.
        lost = on_any_rank(bool(failures)) and self._lost_folder()
        self._conclude(failures, self._writing, may_stop=not lost)

    def close(self) -> None:
        """Wait for a background save and release all resources; a failed save is only logged."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._failures and self._writing is not None:
                self.failed.add(self._writing)
            self._report(self._failures, self._writing)
        self._held.close()
        self._copies.free()
        if self._group is not None:
            import torch.distributed as dist

            dist.destroy_process_group(self._group)
            self._group = None

    def _conclude(self, failures: list[str], step: int, *, may_stop: bool = True) -> None:
        if not failures:
            self.failed.discard(step)
            return
        self.failed.add(step)
        self._report(failures, step)
        if self._policy.stop_on_failure and may_stop:
            # A failure with a remedy of its own is not the disk's fault.
            mended = all("fix: " in failure for failure in failures)
            disk = "" if mended else "free space or repair the disk, then "
            raise CheckpointError(
                Problem(
                    "a checkpoint could not be written",
                    "\n".join(failures),
                    f"{disk}resume from the last checkpoint; "
                    "save_failure='continue' would train on",
                )
            )

    def _report(self, failures: list[str], step: int | None) -> None:
        if failures and self._ranks.is_main:
            logger.error(
                "the checkpoint of step %s was not written; earlier ones are untouched: %s",
                step,
                "; ".join(failures),
            )

    def _prepare(self, engine: Engine, record: RunRecord, copies: HostCopies | None) -> _Save:
        """Make the staging folder and capture all state that training would change."""
        with contextlib.ExitStack() as held:
            output_dir = self._policy.output_dir
            staging = Staging()
            if self._writers.sharers.is_main:
                staging = held.enter_context(new_staging(output_dir, record.step))
            if copies is not None:
                copies.begin()
            captured = self._capture.capture(engine, record, staging, copies)
            if copies is not None:
                copies.end()
            return _Save(captured, staging, held.pop_all())

    def _finish_in_thread(self, save: _Save) -> None:
        try:
            self._failures = self._finish(save)
        except Exception as error:  # a thread must not die silently
            self._failures = [f"rank {self._ranks.rank}: {type(error).__name__}: {error}"]

    def _finish(self, save: _Save) -> list[str]:
        """Write this rank's files; commit if no rank failed; return the failures of all ranks."""
        record = save.captured.record
        records: dict[str, FileRecord] = {}
        failure = None
        try:
            records = save.captured.write(save.staging, self._writers, self._group)
        except DstrainError as error:  # raised alike on all ranks, so without the rank's number
            failure = str(error)
        except Exception as error:
            failure = f"rank {self._ranks.rank}: {type(error).__name__}: {error}"
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        said = gather_objects((self._writers.first, records, failure, now), group=self._group)
        failures = list(dict.fromkeys(failed for *_, failed, _ in said if failed is not None))
        output_dir = self._policy.output_dir
        try:
            if not failures:
                files, elsewhere = files_by_folder(
                    [(first, part) for first, part, *_ in said], self._writers.first
                )
                manifest = replace(
                    save.captured.manifest, created=said[0][-1], files=files, elsewhere=elsewhere
                )
                failures = self._on_each_folder(
                    lambda path: write_manifest(path, manifest), save.staging
                )
            if not failures:
                # Where each machine has a folder, older checkpoints are removed only after all
                # machines have committed this one.
                failures = self._on_each_folder(
                    lambda path: folders.commit(path, output_dir, record.step), save.staging
                )
        finally:
            save.held.close()  # removes the folder unless it has been committed
        if not failures and self._ranks.is_main and record.after_commit is not None:
            folder = folders.checkpoint_path(output_dir, record.step)
            try:
                record.after_commit(folder)
            except Exception as error:  # the checkpoint is committed on all ranks
                logger.error(
                    "%s is saved, but what was to follow failed: %s: %s",
                    folder.name,
                    type(error).__name__,
                    error,
                )
        if not failures and self._writers.sharers.is_main:
            keep = [] if record.best is None else [record.best]
            try:
                folders.rotate(output_dir, limit=self._policy.limit, keep=keep)
            except OSError as error:
                logger.warning("older checkpoints could not be looked through: %s", error)
        return failures

    def _on_each_folder(self, act: Callable[[Path], object], staging: Staging) -> list[str]:
        """Call ``act`` on every folder, on the rank that made it; return failures of all ranks."""
        failure = None
        if staging.path is not None:
            try:
                act(staging.path)
            except Exception as error:  # the other ranks wait for this one
                failure = f"rank {self._ranks.rank}: the commit failed: {error}"
        return gather_failures(failure, group=self._group)
