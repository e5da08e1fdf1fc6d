"""Manifest of a checkpoint: its content and checksums. A folder without one is no checkpoint."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from annotated_types import Le
from pydantic import ConfigDict, StringConstraints, with_config

from dstrain.core.documents import (
    AtLeastOne,
    Count,
    FileName,
    Flag,
    Shape,
    Text,
    loaded,
    parsed,
    typed,
)
from dstrain.core.errors import CheckpointError, Problem
from dstrain.core.files import FileRecord, record_of, sync_folder, write_bytes

NAME = "manifest.json"
SLICES: Literal["slices"] = "slices"
DEEPSPEED: Literal["deepspeed"] = "deepspeed"
Layout = Literal["slices", "deepspeed"]
FORMAT = "dstrain checkpoint"
VERSION = 1


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Manifest:
    """Description of a checkpoint and its files.

    Attributes:
        step: optimizer steps that the run had done.
        world_size: ranks that wrote it.
        stage: ZeRO stage of the run.
        precision: "fp32", "bf16" or "fp16".
        resumable: whether it has optimizer state; False with save_only_model.
        has_weights: whether the folder has the model's weights as Hugging Face files.
        created: time of the commit, ISO 8601, UTC.
        parameters: name -> shape, of every parameter.
        optimized: names of the parameters that have master weights and optimizer state.
        metrics: metrics of the last evaluation before the save, empty where there was none; values
            are from a user's function, so most but not all are numbers.
        versions: versions of dstrain and the libraries that it uses.
        files: path relative to the folder -> size and checksum, of every file but the manifest.
        elsewhere: path -> size and checksum of the files of ranks on other machines' disks; they
            may have been copied into this folder.
        layout: layout of the state for a resume: "slices" by parameter name, or "deepspeed" for
            DeepSpeed's own files.
    """

    step: Count
    world_size: AtLeastOne
    stage: Annotated[Count, Le(3)]
    precision: Annotated[str, StringConstraints(strict=True, pattern="^(fp32|bf16|fp16)$")]
    resumable: Flag
    has_weights: Flag
    created: Text
    parameters: Mapping[Text, Shape]
    optimized: tuple[Text, ...]
    metrics: Mapping[Text, Any] = field(default_factory=dict)
    versions: Mapping[Text, Text] = field(default_factory=dict)
    files: Mapping[FileName, FileRecord] = field(default_factory=dict)
    layout: Layout = SLICES
    elsewhere: Mapping[FileName, FileRecord] = field(default_factory=dict)

    def figure(self, name: str) -> float | None:
        """Return a metric's value; None where the metric is missing or not a number."""
        value = self.metrics.get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return value if is_number else None

    def not_in(self, folder: Path) -> list[str]:
        """List the files of other machines that were not copied into this folder."""
        return [name for name in self.elsewhere if not (folder / name).exists()]

    def has(self, name: str) -> bool:
        """Tell whether a file is part of the checkpoint; no other file in its folder is read."""
        return name in self.files or name in self.elsewhere

    @property
    def has_slices(self) -> bool:
        """Tell whether the checkpoint has slices, and so can be resumed at any topology."""
        return self.resumable and self.layout == SLICES

    @property
    def total_bytes(self) -> int:
        """Count the bytes of all files."""
        return sum(record.size for record in self.files.values())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest to the disk, then rename it to its final name.

    Raises:
        OSError: the disk is full, the folder is gone, and so on.
    """
    body = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    body["checksum"] = _checksum(body)
    partial = folder / f".{NAME}.partial"
    write_bytes(partial, (json.dumps(body, indent=1, allow_nan=False) + "\n").encode())
    os.replace(partial, folder / NAME)
    sync_folder(folder)


def _no_manifest(folder: Path) -> CheckpointError:
    what = f"{folder} is no dstrain checkpoint"
    if (folder / "trainer_state.json").is_file() and not (folder / "state").exists():
        return CheckpointError(
            Problem(
                what,
                f"it has a trainer_state.json and no {NAME}, as those of transformers' Trainer: "
                f"`dstrain checkpoint import {folder} OUT` makes a checkpoint of it",
                "import it, and resume from the checkpoint that this writes",
            )
        )
    if not folder.is_dir():
        return CheckpointError(
            Problem(
                what,
                "there is no such folder",
                "give a folder that `dstrain checkpoint ls` lists",
            )
        )
    return CheckpointError(
        Problem(
            what,
            f"it has no {NAME}: the save did not finish, or another program wrote it",
            "give a folder that `dstrain checkpoint ls` lists",
        )
    )


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: the manifest is missing or damaged, or a newer dstrain wrote it.
    """
    path = folder / NAME
    try:
        body = parsed(loaded(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _no_manifest(folder) from error
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise _damaged(path, f"it does not say {FORMAT!r}")
    version = body.get("version")
    if type(version) is not int or version < 1:
        raise _damaged(path, "its version is no positive number")
    if version > VERSION:
        raise CheckpointError(
            Problem(
                f"{path} has version {version}",
                f"this dstrain reads versions up to {VERSION}",
                "use a newer dstrain",
            )
        )
    if body.pop("checksum", None) != _checksum(body):
        raise _damaged(path, "its content does not have the checksum that stands in it")
    try:
        manifest = typed(
            {k: v for k, v in body.items() if k not in ("format", "version")}, Manifest
        )
        _check_consistent(manifest)
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    return manifest


def _check_consistent(manifest: Manifest) -> None:
    """Check that the fields of a manifest are consistent with each other.

    Raises:
        ValueError: fields contradict each other.
    """
    if unknown := sorted(set(manifest.optimized) - set(manifest.parameters)):
        raise ValueError(f"optimized: {unknown[0]!r} is none of its parameters")
    if NAME in manifest.files or NAME in manifest.elsewhere:
        raise ValueError("files: it lists itself")
    if both := sorted(set(manifest.files) & set(manifest.elsewhere)):
        raise ValueError(f"elsewhere: {both[0]!r} is among its own files too")


def is_dstrain_checkpoint(folder: Path) -> bool:
    """Tell whether dstrain has written a folder as a checkpoint, also if it was damaged since.

    Only such folders are ever removed, renamed or replaced: no symbolic link, no folder without a
    manifest, no folder with another program's manifest.
    """
    path = folder / NAME
    try:
        if not stat.S_ISDIR(os.lstat(folder).st_mode) or not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        begin = loaded(path, 4096)
    except OSError:
        return False
    # If the manifest's text is lost, the files that every checkpoint has beside it count.
    return FORMAT.encode() in begin or _has_our_files(folder)


def _has_our_files(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("state/run.json", "trainer_state.json"))


def check_files(
    folder: Path,
    manifest: Manifest,
    *,
    share: tuple[int, int] = (0, 1),
    only: Collection[str] | None = None,
    on_file: Callable[[int], object] = lambda num_bytes: None,
) -> list[str]:
    """Check the files of a checkpoint against its manifest; return a line for each fault.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        share: (k, n) checks every n-th file from the k-th on, so that ranks share the work.
        only: names of files to check; None for all.
        on_file: called with the bytes of each file that has been checked.
    """
    found = []
    absent = manifest.not_in(folder)
    copied = {name: r for name, r in manifest.elsewhere.items() if name not in absent}
    records = {**manifest.files, **copied}
    if only is not None:
        records = {name: record for name, record in records.items() if name in only}
    for name, expected in sorted(records.items())[share[0] :: share[1]]:
        if problem := _fault_of(folder, name, expected):
            found.append(problem)
        on_file(expected.size)
    return found


def require_files(
    folder: Path,
    manifest: Manifest,
    names: Collection[str],
    *,
    on_file: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """Check that files which are about to be read are as they were written.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        names: paths of the files in the folder.
        on_file: as for ``check_files``.

    Raises:
        CheckpointError: files are damaged or not listed in the manifest; the message names them.
    """
    problems = [f"{n} is not listed in {NAME}" for n in sorted(names) if not manifest.has(n)]
    problems += check_files(folder, manifest, only=names, on_file=on_file)
    if problems:
        raise CheckpointError(
            Problem(f"{folder} is damaged", "\n".join(problems), "use another checkpoint")
        )


def _fault_of(folder: Path, name: str, expected: FileRecord) -> str | None:
    """Return the fault of a file in words; None where the file matches its record."""
    path = folder / name
    try:
        about = path.stat()
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"{name} leads outside of the checkpoint, by a symbolic link"
        if not stat.S_ISREG(about.st_mode):
            return f"{name} is no file"
        if about.st_size != expected.size:
            return f"{name} has {about.st_size} bytes instead of {expected.size}"
        if record_of(path) != expected:
            return f"{name} does not have its checksum: its content has changed"
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, up to Python 3.12
        return f"{name} cannot be read: {getattr(error, 'strerror', None) or error}"
    return None


def extra_files(folder: Path, manifest: Manifest) -> list[str]:
    """List the files in the folder that are no part of the checkpoint."""
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    return sorted(present - set(manifest.files) - set(manifest.elsewhere) - {NAME})


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return f"xxh3:{xxhash.xxh3_64(text.encode()).hexdigest()}"


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(Problem(f"{path} is damaged", why, "use another checkpoint"))
