"""Import of checkpoints that DeepSpeed or transformers saved, as dstrain checkpoints.

No code in the files is executed (``pickles.py``). They are memory-mapped and copied tensor by
tensor, so that memory holds the largest tensor only.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dstrain.checkpoint import content, folders, new_folder
from dstrain.checkpoint.codec import encode
from dstrain.checkpoint.foreign.deepspeed_files import read_deepspeed, tag_folder
from dstrain.checkpoint.foreign.parts import ForeignRun
from dstrain.checkpoint.foreign.pickles import load_pickle
from dstrain.checkpoint.foreign.plain_files import OPTIMIZER, SCHEDULE, read_plain, read_state
from dstrain.checkpoint.manifest import (
    DEEPSPEED,
    NAME,
    Manifest,
    read_manifest,
    require_files,
    write_manifest,
)
from dstrain.checkpoint.run_files import read_run
from dstrain.checkpoint.slice_index import check_coverage, read_index
from dstrain.checkpoint.table_file import write_table
from dstrain.checkpoint.versions import versions
from dstrain.core.documents import loaded, parsed
from dstrain.core.errors import CheckpointError, DstrainError, Problem
from dstrain.core.files import FileRecord, make_durable, write_json
from dstrain.models import Stored, skeleton_of, write_tensor_file

_COPIED = {".json", ".txt", ".model", ".jinja"}
# State of a meter after a log: no earlier step is left to be logged.
_EMPTY_METER = {"loss": 0.0, "finite": 0.0, "bad": -1.0, "steps": 0, "tokens": 0, "seconds": 0.0}
_LEFT_OUT = {NAME, "trainer_state.json", "model.safetensors.index.json"}
_LEFT_OUT |= {"pytorch_model.bin.index.json"}


@dataclass(frozen=True)
class Imported:
    """Result of an import.

    Attributes:
        kind: the program that wrote the source, in words.
        step: optimizer steps of the run.
        num_parameters: number of named parameters.
        remarks: sentences about assumptions, for the user.
    """

    kind: str
    step: int
    num_parameters: int
    remarks: tuple[str, ...]


def import_checkpoint(
    source: Path,
    out: Path,
    *,
    samples_per_epoch: int | None = None,
    global_batch_size: int | None = None,
    on_tensor: Callable[[str, int], object] = lambda name, num_bytes: None,
    on_file: Callable[[int], object] = lambda num_bytes: None,
) -> Imported:
    """Make a dstrain checkpoint ``out`` from the checkpoint in ``source``.

    Args:
        source: a folder with ``latest`` or the files of one tag (DeepSpeed), a ``checkpoint-N`` of
            transformers' Trainer with or without DeepSpeed, or a checkpoint of dstrain in
            DeepSpeed's layout.
        out: folder of the new checkpoint, which must not exist or be empty.
        samples_per_epoch: size of the training data, where ``source`` does not say how far into
            an epoch the run was.
        global_batch_size: samples per optimizer step, where ``source`` does not say.
        on_tensor: called with name and bytes of each tensor that is written.
        on_file: called with the bytes of each file that has been verified, where ``source`` has
            checksums.

    Raises:
        CheckpointError: ``source`` has no checkpoint that can be imported, or could only be read by
            executing code in it.
        ModelError: the ``config.json`` in ``source`` does not describe the model.
    """
    new_folder.check_new(out)
    _check_dstrain_checkpoint(source, on_file)
    state = read_state(source)
    found = _read(source, state)
    own = _dstrain_record(source)
    shared, documents, remarks = _shared(
        found, state, samples_per_epoch=samples_per_epoch, batch=global_batch_size
    )
    if own is not None:
        shared = own
    documents["imported.json"] = {
        "source": str(source.resolve()),
        "kind": found.kind,
        "deepspeed_config": encode(
            json.loads(json.dumps(found.config, default=str)), where="the DeepSpeed config"
        ),
    }
    with new_folder.filled_atomically(out) as staging:
        (staging / folders.STATE).mkdir()
        files = _write(found, staging, shared, documents, on_tensor)
        files |= _copy_model_files(source, staging)
        ranks = _copy_random_states(source, staging, len(found.partitions)) if own else {}
        ranks |= _copy_buffers(source, staging, len(found.partitions)) if own else {}
        manifest = Manifest(
            step=found.step,
            world_size=len(found.partitions),
            stage=found.stage,
            precision=found.precision,
            resumable=True,
            has_weights=False,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            parameters=found.parameters,
            optimized=found.optimized,
            versions=versions(),
            files=files | ranks,
        )
        index = read_index(staging, manifest)
        if missing := check_coverage(index, manifest):
            raise CheckpointError(
                [Problem(line) for line in missing], title=f"{source} does not hold everything"
            )
        table = write_table(staging / content.TABLE, index.table, manifest.parameters)
        files = {**manifest.files, content.TABLE: table}
        write_manifest(staging, replace(manifest, files=files))
    return Imported(found.kind, found.step, len(found.parameters), (*found.remarks, *remarks))


def _check_dstrain_checkpoint(source: Path, on_file: Callable[[int], object]) -> None:
    """Verify ``source`` where it is a dstrain checkpoint; accept only DeepSpeed's layout.

    Raises:
        CheckpointError: it is in the layout of slices, or damaged.
    """
    if not (source / NAME).exists():
        return
    manifest = read_manifest(source)
    if manifest.layout != DEEPSPEED:
        raise CheckpointError(
            Problem(f"{source} is a dstrain checkpoint already", "", "resume from it as it is")
        )
    require_files(source, manifest, list(manifest.files), on_file=on_file)


def _read(source: Path, state: Mapping[str, Any]) -> ForeignRun:
    if not source.is_dir():
        raise CheckpointError(Problem(f"{str(source)!r} is no folder"))
    folder = tag_folder(source)
    if folder is not None:
        decayed = None
        with contextlib.suppress(DstrainError):  # needed at stage 0 only
            decayed = skeleton_of(source).decayed if (source / "config.json").exists() else None
        found = read_deepspeed(folder, decayed)
        if found.engine["schedule"] is None and (source / SCHEDULE).exists():
            # transformers' Trainer steps the schedule itself, so DeepSpeed does not know of it.
            schedule = load_pickle(source / SCHEDULE)
            found = replace(found, engine=found.engine | {"schedule": schedule})
        return found
    if (source / OPTIMIZER).exists() and state:
        return read_plain(source, state)
    inside = [found.folder for found in folders.named(source)]
    raise CheckpointError(
        Problem(
            f"nothing in {str(source)!r} can be imported",
            "it has neither DeepSpeed's files (latest, *_model_states.pt) nor those of "
            f"transformers' Trainer ({OPTIMIZER}, trainer_state.json)",
            f"did you mean {str(inside[-1])!r}?" if inside else "name a checkpoint's folder",
        )
    )


def _shared(
    found: ForeignRun, state: Mapping[str, Any], *, samples_per_epoch: int | None, batch: int | None
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Make ``run.json`` and ``trainer_state.json``, and remarks on what had to be assumed."""
    remarks = []
    batch = batch or found.global_batch_size
    if batch is None:
        batch = int(state.get("train_batch_size") or 1)
        remarks.append(
            f"a global batch of {batch} samples is assumed (one process, no accumulation); "
            "--global_batch_size says another"
        )
    step, epoch, steps_in_epoch, samples = found.step, 0, 0, 0
    done = float(state.get("epoch") or 0.0)
    if samples_per_epoch:
        epoch, samples = divmod(step * batch, samples_per_epoch)
        steps_in_epoch = samples // batch
    elif done:
        per_epoch = max(1, round(step / done))
        epoch, steps_in_epoch = divmod(step, per_epoch)
        samples = steps_in_epoch * batch
    else:
        remarks.append(
            "how far into an epoch the run was is not known: it goes on with the first sample of "
            "one; --samples_per_epoch tells"
        )
    remarks.append("random states are not imported, and the order of samples is dstrain's own")
    seen = found.engine["counters"]["global_samples"] or step * batch
    groups = found.engine["groups"]
    position = {
        "progress": {
            "step": step,
            "epoch": epoch,
            "steps_in_epoch": steps_in_epoch,
            "samples_in_epoch": samples,
            "num_input_tokens": 0,
        },
        "epoch_is_over": False,
        "applied": True,
        "grad_norm": None,
        "learning_rate": float(groups[0].get("lr", 0.0)) if groups else 0.0,
        "skipped_steps": found.engine["counters"]["skipped_steps"],
        "loss_sum": _loss_sum(state),
        "samples_seen": seen,
        "meters": [_EMPTY_METER],
    }
    kept = {k: v for k, v in state.items() if k != "best_model_checkpoint"}
    documents = {
        "trainer_state.json": {
            "global_step": step,
            "epoch": epoch + (done - int(done) if done else 0.0),
            "log_history": [],
            **kept,
            "best_model_checkpoint": None,  # its folder is not one of ours
        }
    }
    engine = found.engine | {"counters": found.engine["counters"] | {"global_samples": seen}}
    shared = {"engine": engine, "position": position, "global_batch_size": batch}
    return encode(shared, where="the run's state"), documents, remarks


def _loss_sum(state: Mapping[str, Any]) -> float:
    """Estimate the sum of all steps' losses from the log; an entry counts for all its steps."""
    total, before = 0.0, 0
    for entry in state.get("log_history") or []:
        if "loss" in entry and entry.get("step", 0) > before:
            total += float(entry["loss"]) * (entry["step"] - before)
            before = entry["step"]
    return total


def _dstrain_record(source: Path) -> dict[str, Any] | None:
    """Read ``run.json`` of a dstrain checkpoint in DeepSpeed's layout; None where it has none."""
    path = source / content.RUN
    if not (source / NAME).exists() or not path.exists():
        return None
    read_run(source)
    values: dict[str, Any] = parsed(loaded(path))
    return values


def _write(
    found: ForeignRun,
    staging: Path,
    shared: Any,
    documents: Mapping[str, Any],
    on_tensor: Callable[[str, int], object],
) -> dict[str, FileRecord]:
    files = {}
    for rank, partition in enumerate(found.partitions):
        metadata = content.metadata_of(partition.spans, partition.scalars)
        tensors = [_reported(stored, on_tensor) for stored in partition.tensors]
        name = content.slice_file(rank)
        files[name] = write_tensor_file(staging / name, tensors, metadata)
    if found.buffers:
        files[content.BUFFERS] = write_tensor_file(staging / content.BUFFERS, found.buffers)
    files[content.RUN] = write_json(staging / content.RUN, shared)
    for name, document in documents.items():
        files[name] = write_json(staging / name, document)
    return files


def _reported(stored: Stored, on_tensor: Callable[[str, int], object]) -> Stored:
    def load() -> Any:
        on_tensor(stored.name, stored.num_bytes)
        return stored.load()

    return Stored(stored.name, stored.shape, stored.dtype, load)


def _copy_model_files(source: Path, staging: Path) -> dict[str, FileRecord]:
    """Copy config and tokenizer files, so that an export of the checkpoint is complete."""
    files = {}
    for path in sorted(source.iterdir()):
        wanted = path.is_file() and path.suffix in _COPIED and path.name not in _LEFT_OUT
        if wanted and not (staging / path.name).exists():
            shutil.copyfile(path, staging / path.name)
            files[path.name] = make_durable(staging / path.name)
    return files


def _copy_random_states(source: Path, staging: Path, count: int) -> dict[str, FileRecord]:
    """Copy the random states of a dstrain run, if it had as many ranks as the import has files."""
    names = [content.rank_file(rank) for rank in range(count)]
    if not all((source / name).exists() for name in names):
        return {}
    if (source / content.rank_file(count)).exists():
        return {}  # there were more ranks than slice files: stage 0
    files = {}
    for name in names:
        shutil.copyfile(source / name, staging / name)
        files[name] = make_durable(staging / name)
    return files


def _copy_buffers(source: Path, staging: Path, count: int) -> dict[str, FileRecord]:
    """Copy the files of buffers of the first ``count`` ranks of a dstrain run."""
    names = [content.BUFFERS, content.OTHER_BUFFERS]
    names += [content.buffer_file(rank) for rank in range(count)]
    files = {}
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, staging / name)
            files[name] = make_durable(staging / name)
    return files
