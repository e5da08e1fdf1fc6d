"""Capturing the content of a checkpoint, so that it can be written while training goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.checkpoint import content, native
from dstrain.checkpoint.codec import encode
from dstrain.checkpoint.extra_state import EXTRA_STATES, extra_states, lost_remark, rank_states
from dstrain.checkpoint.folders import LOCK
from dstrain.checkpoint.manifest import DEEPSPEED, SLICES, Manifest
from dstrain.checkpoint.policy import Policy, RunRecord
from dstrain.checkpoint.slice_agreement import agree_on_table
from dstrain.checkpoint.slice_index import check_whole
from dstrain.checkpoint.staging import Staging
from dstrain.checkpoint.table_file import write_table
from dstrain.checkpoint.versions import versions
from dstrain.checkpoint.writers import Writers
from dstrain.core.documents import check_depth
from dstrain.core.errors import CheckpointError, Problem
from dstrain.core.files import FileRecord, make_durable, write_bytes, write_json
from dstrain.core.host import available_bytes
from dstrain.core.log import get_logger
from dstrain.core.ranks import all_or_none, gather_objects, on_any_rank
from dstrain.core.records import described, unrecordable
from dstrain.core.secrets import without_secrets
from dstrain.engine import Engine, main_rank_buffers
from dstrain.models import (
    HostCopies,
    WeightSnapshot,
    record_layout,
    save_configs,
    save_model,
    snapshot_bytes,
    snapshot_weights,
    unsaved_remark,
    write_tensor_file,
)

logger = get_logger(__name__)

# Copies for a background save may take this share of the available memory.
_MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class Captured:
    """This rank's part of a checkpoint's content, which training no longer changes.

    Attributes:
        record: values that the trainer adds.
        manifest: manifest of the checkpoint, without the list of its files.
        folder: the staging folder if ranks have already agreed on it, else None.
        slices: this rank's share of the state; None without the layout of slices.
        weights: copies of the model's weights; None where they are already written into ``folder``,
            or none are saved.
        rank_state: the content of this rank's JSON file; None in a checkpoint of the model alone.
        shared: the content of ``run.json``.
        layout: the content of ``layout.json``, on the main rank of each folder.
        rank_buffers: buffers that only this rank has.
        buffers: the model's persistent buffers, on the main rank of each folder.
        other_buffers: changed buffers that are in no ``state_dict``.
        failure: error of a file that ``capture`` failed to write, which ``write`` raises.
    """

    record: RunRecord
    manifest: Manifest
    folder: Path | None
    slices: content.Slices | None
    weights: WeightSnapshot | None
    rank_state: Any
    shared: Any
    layout: Any
    rank_buffers: content.Buffers
    buffers: content.Buffers
    other_buffers: content.Buffers
    failure: Exception | None

    def write(self, staging: Staging, writers: Writers, group: Any) -> dict[str, FileRecord]:
        """Write this rank's files; a collective of all ranks in ``group``.

        Args:
            staging: the staging folder, known to the rank that made it.
            writers: the ranks that write.
            group: the process group of the writing threads.

        Returns:
            A record of size and checksum for each file of this rank, by its name.

        Raises:
            OSError: the disk is full, the folder is gone, and so on.
            DstrainError: a value cannot be written to its file.
        """
        # Collectives first: a rank that fails below must not leave others waiting in one.
        folder = self.folder or staging.agreed(writers.first, group=group)
        listed = _files_in(folder) if writers.sharers.is_main else []
        present = gather_objects(listed, group=group)[writers.first]
        weights = None if self.weights is None else self.weights.exchanged(group)
        table = None
        if self.slices is not None:
            about, several = self.slices.about, len(writers.groups) > 1
            table = agree_on_table(
                about, self.manifest.parameters, writers.ranks, group=group, on_all=several
            )
        if self.failure is not None:
            raise self.failure
        sharers = writers.sharers
        records = {}
        for name in present[sharers.rank :: sharers.world_size]:
            records[name] = make_durable(folder / name)
        if weights is not None:
            records |= weights.write(folder, with_index=sharers.is_main)
        records |= self._write_rank_files(folder, writers.ranks.rank)
        if sharers.is_main:
            records |= self._write_shared_files(folder)
            if table is not None:
                # Machines without a shared disk each have a copy of what all ranks hold.
                check_whole(table, self.manifest, may_have_copies=len(writers.groups) > 1)
                path = folder / content.TABLE
                records[content.TABLE] = write_table(path, table, self.manifest.parameters)
        return records

    def _write_rank_files(self, folder: Path, rank: int) -> dict[str, FileRecord]:
        records = {}
        if self.slices is not None:
            name = content.slice_file(rank)
            records[name] = write_tensor_file(
                folder / name, self.slices.tensors, self.slices.metadata
            )
        if self.manifest.resumable:
            name = content.rank_file(rank)
            records[name] = write_bytes(folder / name, json.dumps(self.rank_state).encode())
            records |= self.rank_buffers.write(folder, content.buffer_file(rank))
        return records

    def _write_shared_files(self, folder: Path) -> dict[str, FileRecord]:
        records = {}
        if self.manifest.resumable:
            records[content.RUN] = write_json(folder / content.RUN, self.shared)
            if self.layout is not None:
                records[content.LAYOUT] = write_json(folder / content.LAYOUT, self.layout)
            if self.slices is None:
                latest = native.tag_of(self.record.step).encode()
                records[native.LATEST] = write_bytes(folder / native.LATEST, latest)
            records |= self.buffers.write(folder, content.BUFFERS)
            records |= self.other_buffers.write(folder, content.OTHER_BUFFERS)
        for name, document in self.record.documents.items():
            records[name] = _write_document(folder / name, document)
        return records


class ContentCapture:
    """Captures checkpoint content from an engine; every method is a collective of all ranks."""

    def __init__(self, policy: Policy, writers: Writers) -> None:
        """Set up for a run.

        Args:
            policy: the run's choices about saving.
            writers: the ranks that write.
        """
        self._policy, self._writers, self._ranks = policy, writers, writers.ranks
        self._warned_of_caches = self._warned_of_lost_state = False

    def copies_fit(self, engine: Engine) -> bool:
        """Tell whether every machine has memory for copies of its ranks' slices.

        State that is offloaded to a local disk is not copied, since only the disk has room for it,
        and a copy there takes as long as writing the checkpoint.
        """
        ranks, sharers = self._ranks, self._writers.sharers
        slices = content.rank_slices(engine, sharers)
        if on_any_rank(bool(slices.on_disk)):
            if ranks.is_main:
                logger.info("checkpoints are written while training waits: their state is on NVMe")
            return False
        needed = slices.num_bytes
        if self._policy.with_weights:
            needed += snapshot_bytes(engine.module, ranks, num_writers=sharers.world_size)
        available = available_bytes()
        fits = available is None or needed * ranks.local_world_size <= _MEMORY_SHARE * available
        everywhere = not on_any_rank(not fits)
        if not everywhere and ranks.is_main:
            logger.warning(
                "checkpoints are written while training waits: a copy of the state takes "
                "%.1f GB per rank, more than half of the memory that is left",
                needed / 1e9,
            )
        return everywhere

    def capture(
        self, engine: Engine, record: RunRecord, staging: Staging, copies: HostCopies | None
    ) -> Captured:
        """Capture all state that further training would change.

        Args:
            engine: the engine.
            record: values that the trainer adds.
            staging: the staging folder, known to the rank that made it. Files that need a
                collective, or that transformers writes, are written into it now.
            copies: makes copies in host memory, in a round that the caller begins and ends. None
                where training waits for the write, which then reads the engine's own tensors.

        Raises:
            CheckpointError: the state cannot be saved; raised on all ranks.
            ModelError: the folder could not be made; raised on all ranks.
        """
        policy, sharers = self._policy, self._writers.sharers
        slices: content.Slices | None = None
        engine.buffers.find_changed()
        self._warn_of_caches(engine)
        extra, rank_extra = self._extra_states(engine)
        beside = {EXTRA_STATES: rank_extra} if rank_extra else {}
        with all_or_none():  # ends before copies begin, so that no rank waits for another's copies
            if not policy.only_model and policy.layout == SLICES:
                slices = content.rank_slices(engine, sharers)
            rank_state = encode({**record.rank_state, **beside}, where="this rank's state")
            shared = encode(
                {
                    "engine": engine.state.read_progress(),
                    "formats": content.formats(engine),
                    EXTRA_STATES: extra if sharers.is_main else {},
                    **record.shared,
                },
                where="the run's state",
            )
        rank_buffers = content.buffer_contents(engine.buffers.rank_state()).copied(copies, "own")
        weights = folder = None
        buffers = content.Buffers([])
        with main_rank_buffers(engine.module, wanted=engine.buffers.differ_between_ranks):
            if policy.with_weights and copies is not None:
                groups = self._writers.groups
                weights = snapshot_weights(engine.module, self._ranks, copies, groups=groups)
            if copies is None or (policy.with_weights and weights is None):
                folder = staging.agreed(self._writers.first)  # else the writing thread does this
            if folder is not None and policy.with_weights:
                save_model(engine.module, folder, self._ranks, on_each_node=policy.on_each_node)
            if sharers.is_main:
                buffers = content.buffers(engine.module).copied(copies)
            if not policy.only_model and policy.layout == DEEPSPEED:
                assert folder is not None
                engine.state.save_native(folder, native.tag_of(record.step))
        other_buffers = content.buffer_contents(engine.buffers.outside_state_dict()).copied(
            copies, "other"
        )
        if slices is not None and copies is not None:
            slices = slices.copied(copies)
        layout, failure = self._write_small_files(engine, record, staging)
        return Captured(
            record=record,
            manifest=self._manifest(engine, record),
            folder=folder,
            slices=slices,
            weights=weights,
            rank_state=rank_state,
            shared=shared,
            layout=layout,
            rank_buffers=rank_buffers,
            buffers=buffers,
            other_buffers=other_buffers,
            failure=failure,
        )

    def _write_small_files(
        self, engine: Engine, record: RunRecord, staging: Staging
    ) -> tuple[list[dict[str, Any]] | None, Exception | None]:
        """Write the model's and the processor's small files, on the main rank of each folder.

        Returns:
            The record of the model's layout (None on other ranks), and the error of a failed write.
        """
        if not self._writers.sharers.is_main:
            return None, None
        try:
            layout = record_layout(engine.module)
            if self._policy.with_weights and staging.path is not None:
                save_configs(engine.module, staging.path)
            if record.write_processor is not None and staging.path is not None:
                record.write_processor(staging.path)
        except Exception as error:  # a tokenizer may raise anything; ``write`` raises it
            return None, error
        return layout, None

    def _manifest(self, engine: Engine, record: RunRecord) -> Manifest:
        return Manifest(
            step=record.step,
            world_size=self._ranks.world_size,
            stage=engine.resolved.stage,
            precision=engine.resolved.precision,
            resumable=not self._policy.only_model,
            has_weights=self._policy.with_weights,
            created="",
            parameters=content.parameter_shapes(engine),
            optimized=tuple(engine.state.optimized_names()),
            metrics=record.metrics,
            versions=versions(),
            layout=self._policy.layout,
        )

    def _warn_of_caches(self, engine: Engine) -> None:
        """Warn once of changed buffers that checkpoints leave out as caches."""
        caches = [] if self._policy.only_model else engine.buffers.caches()
        if caches and self._ranks.is_main and not self._warned_of_caches:
            self._warned_of_caches = True
            logger.warning(
                "%d buffers that are in no state_dict were replaced by other tensors (%s): they "
                "are taken for caches and are not in checkpoints; change a buffer in place if it "
                "must be saved",
                len(caches),
                ", ".join(caches[:3]),
            )

    def _extra_states(self, engine: Engine) -> tuple[dict[str, Any], dict[str, Any]]:
        """Get the modules' extra state; warn once per run of extra state that cannot be saved.

        A checkpoint of the model alone has no file for extra state; modules are then only searched
        until the warning has been given.

        Returns:
            The main rank's states by path of the module, and the states in which this rank differs.
        """
        if self._policy.only_model:
            if not self._warned_of_lost_state:
                self._warn_of_lost_state(unsaved_remark(engine.module))
            return {}, {}
        with all_or_none():
            states, lost = extra_states(engine.module)
        lost = sorted({path for theirs in gather_objects(lost) for path in theirs})
        self._warn_of_lost_state(lost_remark(lost) if lost else None)
        return rank_states(states)

    def _warn_of_lost_state(self, remark: str | None) -> None:
        if remark is None or self._warned_of_lost_state:
            return
        self._warned_of_lost_state = True
        if self._ranks.is_main:
            logger.warning("%s", remark)


def _write_document(path: Path, document: Any) -> FileRecord:
    """Write a JSON document of the trainer with credentials masked; callbacks may hold some.

    Raises:
        CheckpointError: JSON cannot hold a value in it; a callback can put anything there.
    """
    try:
        check_depth(document)
    except ValueError as error:
        raise CheckpointError(
            Problem(
                f"{path.name}: {error}",
                "a callback's state or a log entry is nested that deep",
                "flatten it",
            )
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
    """List the files already written into a staging folder."""
    return sorted(
        str(p.relative_to(staging)) for p in staging.rglob("*") if p.is_file() and p.name != LOCK
    )
