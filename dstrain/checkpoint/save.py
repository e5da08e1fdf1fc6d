"""Writing checkpoints: what is copied while training waits, what is written, and the commit."""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dstrain.checkpoint import content, folders, native
from dstrain.checkpoint.codec import encode
from dstrain.checkpoint.extra_state import (
    EXTRA_STATES,
    extra_states,
    lost_remark,
    own_states,
)
from dstrain.checkpoint.manifest import DEEPSPEED, SLICES, Manifest, write_manifest
from dstrain.checkpoint.policy import Policy, RunRecord
from dstrain.checkpoint.run_lock import RunLock
from dstrain.checkpoint.staging import Staging, new_staging
from dstrain.checkpoint.versions import versions
from dstrain.core.documents import check_depth
from dstrain.core.errors import CheckpointError, DstrainError, Problem
from dstrain.core.files import FileRecord, make_durable, write_bytes, write_json
from dstrain.core.host import available_bytes
from dstrain.core.log import get_logger
from dstrain.core.ranks import PATIENCE, Ranks, all_or_none, gather_objects, is_distributed
from dstrain.core.records import described, unrecordable
from dstrain.core.secrets import without_secrets
from dstrain.engine import (
    Engine,
    main_ranks_buffers,
    optimized_names,
    read_progress,
    save_native,
)
from dstrain.models import (
    HostCopies,
    held_bytes,
    hold_shards,
    record_layout,
    save_configs,
    save_model,
    unsaved_remark,
    write_tensor_file,
)

logger = get_logger(__name__)

# A copy of the slices may take this share of the memory that is left.
_MEMORY_SHARE = 0.5


@dataclass
class _Job:
    """A save whose content no longer depends on training."""

    record: RunRecord
    staging: Staging
    manifest: Manifest
    write: Callable[[], dict[str, FileRecord]]
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


class CheckpointWriter:
    """Saves of one run; every method is a collective of all ranks.

    Attributes:
        failed: steps whose checkpoints could not be written, as far as that is known.
        last: the step that was to be saved last; None before the first.
    """

    def __init__(self, policy: Policy, ranks: Ranks, lock: RunLock) -> None:
        """Clear up after killed runs, and refuse a second run in the same folder.

        Args:
            policy: what is saved where.
            ranks: facts of this process.
            lock: of the run on the folder, which the writer holds until it is closed.

        Raises:
            CheckpointError: another run is writing there.
        """
        self._policy, self._ranks = policy, ranks
        # The ranks that write into one folder; the first of them does what is done once in it.
        self._sharers = ranks.on_machine() if policy.on_each_node else ranks
        firsts = gather_objects(self._folder_of)
        self._groups = tuple(
            tuple(rank for rank, first in enumerate(firsts) if first == folder)
            for folder in sorted(set(firsts))
        )
        self._held = contextlib.ExitStack()
        self._lock = lock
        with all_or_none():
            if self._sharers.is_main:
                self._held.enter_context(lock.held())
                folders.recover(policy.output_dir)
        self._asynchronous = False if policy.layout == DEEPSPEED else policy.asynchronous
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._failures: list[str] = []
        self._writing: int | None = None
        self._warned = self._said_lost = False
        self.failed: set[int] = set()
        self.last: int | None = None
        self._group: Any = None
        if is_distributed():
            import torch.distributed as dist

            # Its own group: what the writing threads agree on must not meet training's collectives.
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def save(self, engine: Engine, record: RunRecord) -> None:
        """Save the engine's state and ``record`` as ``checkpoint-<step>``.

        In the background training goes on once this rank's slices are copied; a save that is still
        being written is waited for first.

        Raises:
            CheckpointError: the optimizer cannot be saved; or a save failed (this one, or in the
                background the one before) and the policy says stop.
        """
        self.wait()
        self.last = record.step
        with all_or_none():
            if self._sharers.is_main:
                self._lock.keep()
        if self._asynchronous is None:
            self._asynchronous = self._copies_fit(engine)
        failures = self._begin(engine, record)
        if self._thread is not None:
            return
        if failures and self._lost_folder():
            failures = self._begin(engine, record)
            if self._thread is not None:
                return
        self._conclude(failures, record.step)

    def _begin(self, engine: Engine, record: RunRecord) -> list[str]:
        """Save, or begin to in the background; return the failures so far, alike on all ranks."""
        try:
            job = self._prepare(engine, record, self._copies if self._asynchronous else None)
        except DstrainError as error:
            if isinstance(error, CheckpointError):
                raise
            return [str(error)]
        if not self._asynchronous:
            return self._finish(job)
        self._writing = record.step
        self._thread = threading.Thread(
            target=self._finish_in_thread, args=(job,), name="checkpoint"
        )
        self._thread.start()
        return []

    def _lost_folder(self) -> bool:
        """Tell whether the folder was moved or removed under a save; a collective.

        That is no failure of the disk: by now the folder has been made anew, and can be written.
        """
        lost = False
        with all_or_none():
            if self._sharers.is_main:
                lost = self._lock.keep()
        return any(gather_objects(lost))

    def wait(self) -> None:
        """Wait until nothing is being written any more.

        Raises:
            CheckpointError: that save failed and the policy says stop.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failures, self._failures = self._failures, []
        assert self._writing is not None
        # Training has gone on since: a folder that was lost costs this checkpoint, not the run.
        lost = any(gather_objects(bool(failures))) and self._lost_folder()
        self._conclude(failures, self._writing, may_stop=not lost)

    def close(self) -> None:
        """Wait, and give everything back; a failure is logged and noted, and no error."""
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
            # What is no fault of the disk says its own remedy.
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

    def _copies_fit(self, engine: Engine) -> bool:
        """Tell whether every machine has memory for copies of its ranks' slices; a collective."""
        ranks = self._ranks
        needed = content.own_slices(engine, self._sharers).num_bytes
        if self._policy.with_weights:
            needed += held_bytes(engine.module, ranks, num_writers=self._sharers.world_size)
        available = available_bytes()
        fits = available is None or needed * ranks.local_world_size <= _MEMORY_SHARE * available
        everywhere = all(gather_objects(fits))
        if not everywhere and ranks.is_main:
            logger.warning(
                "checkpoints are written while training waits: a copy of the state takes "
                "%.1f GB per rank, more than half of the memory that is left",
                needed / 1e9,
            )
        return everywhere

    def _prepare(self, engine: Engine, record: RunRecord, copies: HostCopies | None) -> _Job:
        """Make the folder, and everything in it that training would change."""
        with contextlib.ExitStack() as held:
            output_dir = self._policy.output_dir
            staging = Staging()
            if self._sharers.is_main:
                staging = held.enter_context(new_staging(output_dir, record.step))
            if copies is not None:
                copies.begin()
            job = self._fill(engine, record, staging, copies)
            if copies is not None:
                copies.end()
            job.held = held.pop_all()
            return job

    def _fill(
        self, engine: Engine, record: RunRecord, staging: Staging, copies: HostCopies | None
    ) -> _Job:
        ranks, policy, sharers = self._ranks, self._policy, self._sharers
        slices: content.Slices | None = None
        engine.buffers.look()
        self._warn_of_caches(engine)
        extra, own_extra = self._extra_states(engine)
        beside = {EXTRA_STATES: own_extra} if own_extra else {}
        with all_or_none():  # before copies, whose end no rank needs to wait for on another
            if not policy.only_model and policy.layout == SLICES:
                slices = content.own_slices(engine, sharers)
            own = encode({**record.own, **beside}, where="this rank's state")
            shared = encode(
                {
                    "engine": read_progress(engine),
                    "formats": content.formats(engine),
                    EXTRA_STATES: extra if sharers.is_main else {},
                    **record.shared,
                },
                where="the run's state",
            )
        own_buffers = content.buffer_contents(engine.buffers.own()).copied(copies, "own")
        weights = folder = None
        buffers = content.Buffers([])
        with main_ranks_buffers(engine.module, wanted=engine.buffers.differ):
            if policy.with_weights and copies is not None:
                weights = hold_shards(engine.module, ranks, copies, groups=self._groups)
            if copies is None or (policy.with_weights and weights is None):
                folder = staging.agreed(self._folder_of)  # else in the thread, beside training
            if folder is not None and policy.with_weights:
                save_model(engine.module, folder, ranks, on_each_node=policy.on_each_node)
            if sharers.is_main:
                buffers = content.buffers(engine.module).copied(copies)
            if not policy.only_model and policy.layout == DEEPSPEED:
                assert folder is not None
                save_native(engine, folder, native.tag_of(record.step))
        other_buffers = content.buffer_contents(engine.buffers.beside_model()).copied(
            copies, "other"
        )
        if slices is not None and copies is not None:
            slices = slices.copied(copies)
        failure: Exception | None = None
        layout = None
        if sharers.is_main:
            try:
                layout = record_layout(engine.module)
                if policy.with_weights and staging.path is not None:
                    save_configs(engine.module, staging.path)
                if record.write_processor is not None and staging.path is not None:
                    record.write_processor(staging.path)
            except Exception as error:  # a tokenizer may raise anything; told to all in ``write``
                failure = error

        def write() -> dict[str, FileRecord]:
            # Collectives first: whoever fails below must not leave the others in one.
            path = folder or staging.agreed(self._folder_of, group=self._group)
            present = gather_objects(_files_in(path), group=self._group)[self._folder_of]
            whole = None if weights is None else weights.exchanged(self._group)
            if failure is not None:
                raise failure
            records = {}
            for name in present[sharers.rank :: sharers.world_size]:
                records[name] = make_durable(path / name)
            if whole is not None:
                records |= whole.write(path, with_index=sharers.is_main)
            if slices is not None:
                name = content.slice_file(ranks.rank)
                records[name] = write_tensor_file(path / name, slices.tensors, slices.metadata)
            if not policy.only_model:
                name = content.rank_file(ranks.rank)
                records[name] = write_bytes(path / name, json.dumps(own).encode())
                records |= own_buffers.write(path, content.buffer_file(ranks.rank))
            if sharers.is_main:
                if not policy.only_model:
                    records[content.RUN] = write_json(path / content.RUN, shared)
                    if layout is not None:
                        records[content.LAYOUT] = write_json(path / content.LAYOUT, layout)
                    if slices is None:
                        latest = native.tag_of(record.step).encode()
                        records[native.LATEST] = write_bytes(path / native.LATEST, latest)
                    records |= buffers.write(path, content.BUFFERS)
                    records |= other_buffers.write(path, content.OTHER_BUFFERS)
                for name, document in record.documents.items():
                    records[name] = _write_document(path / name, document)
            return records

        manifest = Manifest(
            step=record.step,
            world_size=ranks.world_size,
            stage=engine.resolved.stage,
            precision=engine.resolved.precision,
            resumable=not policy.only_model,
            has_weights=policy.with_weights,
            created="",
            parameters=content.parameter_shapes(engine),
            optimized=tuple(optimized_names(engine)),
            metrics=record.metrics,
            versions=versions(),
            layout=policy.layout,
        )
        return _Job(record, staging, manifest, write)

    def _warn_of_caches(self, engine: Engine) -> None:
        """Say once which changed buffers a resumed run will not find."""
        caches = [] if self._policy.only_model else engine.buffers.caches()
        if caches and self._ranks.is_main and not self._warned:
            self._warned = True
            logger.warning(
                "%d buffers that are in no state_dict were replaced by other tensors (%s): they "
                "are taken for caches and are not in checkpoints; what must be is changed in place",
                len(caches),
                ", ".join(caches[:3]),
            )

    def _extra_states(self, engine: Engine) -> tuple[dict[str, Any], dict[str, Any]]:
        """Ask modules for their extra state; a collective of all ranks.

        It is said once per run which of it a reader will not find. A checkpoint of the model alone
        has it in no file of its own, so that it is only looked for until something was said.

        Returns:
            the main rank's, by path; and of this rank's what the main rank has otherwise.
        """
        if self._policy.only_model:
            if not self._said_lost:
                self._say_lost(unsaved_remark(engine.module))
            return {}, {}
        with all_or_none():
            states, lost = extra_states(engine.module)
        lost = sorted({path for theirs in gather_objects(lost) for path in theirs})
        self._say_lost(lost_remark(lost) if lost else None)
        return own_states(states)

    def _say_lost(self, remark: str | None) -> None:
        if remark is None or self._said_lost:
            return
        self._said_lost = True
        if self._ranks.is_main:
            logger.warning("%s", remark)

    def _finish_in_thread(self, job: _Job) -> None:
        try:
            self._failures = self._finish(job)
        except Exception as error:  # a thread must not die silently
            self._failures = [f"rank {self._ranks.rank}: {type(error).__name__}: {error}"]

    def _finish(self, job: _Job) -> list[str]:
        """Write this rank's files; commit if every rank could; return the failures of all ranks."""
        records: dict[str, FileRecord] = {}
        failure = None
        try:
            records = job.write()
        except DstrainError as error:  # of all ranks
            failure = str(error)
        except Exception as error:
            failure = f"rank {self._ranks.rank}: {type(error).__name__}: {error}"
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        said = gather_objects((self._folder_of, records, failure, now), group=self._group)
        failures = list(dict.fromkeys(failed for *_, failed, _ in said if failed is not None))
        output_dir = self._policy.output_dir
        try:
            if not failures:
                files, elsewhere = self._shared_out([(m, part) for m, part, *_ in said])
                manifest = replace(
                    job.manifest, created=said[0][-1], files=files, elsewhere=elsewhere
                )
                failures = self._together(lambda path: write_manifest(path, manifest), job.staging)
            if not failures:
                # Where each machine has a folder, none has lost an older one until all have this.
                failures = self._together(
                    lambda path: folders.commit(path, output_dir, job.record.step), job.staging
                )
        finally:
            job.held.close()  # removes the folder unless it has been committed
        if not failures and self._ranks.is_main and job.record.after_commit is not None:
            folder = folders.place(output_dir, job.record.step)
            try:
                job.record.after_commit(folder)
            except Exception as error:  # the checkpoint is there, and other ranks know it as such
                logger.error(
                    "%s is saved, but what was to follow failed: %s: %s",
                    folder.name,
                    type(error).__name__,
                    error,
                )
        if not failures and self._sharers.is_main:
            keep = [] if job.record.best is None else [job.record.best]
            try:
                folders.rotate(output_dir, limit=self._policy.limit, keep=keep)
            except OSError as error:
                logger.warning("older checkpoints could not be looked through: %s", error)
        return failures

    @property
    def _folder_of(self) -> int:
        """Return the first rank that writes into the same folder as this one."""
        return self._ranks.first_on_machine if self._policy.on_each_node else 0

    def _shared_out(
        self, parts: list[tuple[int, dict[str, FileRecord]]]
    ) -> tuple[dict[str, FileRecord], dict[str, FileRecord]]:
        """Split records of files into those of this rank's folder and those of other ranks."""
        files: dict[str, FileRecord] = {}
        elsewhere: dict[str, FileRecord] = {}
        for folder, records in parts:
            if folder == self._folder_of:
                files |= records
            else:
                elsewhere |= {n: r for n, r in records.items() if content.is_of_a_rank(n)}
        return files, elsewhere

    def _together(self, act: Callable[[Path], object], staging: Staging) -> list[str]:
        """Act once on every folder, on the rank that made it; return the failures of all ranks."""
        failure = None
        if staging.path is not None:
            try:
                act(staging.path)
            except Exception as error:  # the other ranks wait for this one
                failure = f"rank {self._ranks.rank}: the commit failed: {error}"
        return [f for f in gather_objects(failure, group=self._group) if f is not None]


def _write_document(path: Path, document: Any) -> FileRecord:
    """Write a JSON document of the trainer with credentials masked; callbacks may hold some.

    Raises:
        CheckpointError: it holds what JSON does not know; a callback can put anything there.
    """
    try:
        check_depth(document)
    except ValueError as error:
        raise CheckpointError(
            Problem(f"{path.name}: {error}", "a callback's state or a log is so", "flatten it")
        ) from error
    try:
        return write_json(path, without_secrets(document))
    except (TypeError, ValueError) as error:
        place, value = next(unrecordable(document, finite=True), ("", error))
        raise CheckpointError(
            Problem(
                f"{path.name}: {place} is {described(value)}",
                "JSON cannot hold it; log() refuses such figures, so a callback has put it there",
                "put a number there: float(value)",
            )
        ) from error


def _files_in(staging: Path) -> list[str]:
    """List the files that were written already."""
    return sorted(
        str(p.relative_to(staging))
        for p in staging.rglob("*")
        if p.is_file() and p.name != folders.LOCK
    )
