"""The manifest: what a checkpoint is made of. A folder without one is no checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from dstrain.core.errors import CheckpointError, Problem
from dstrain.core.files import FileRecord, record_of, sync_folder, write_bytes

NAME = "manifest.json"
SLICES = "slices"
DEEPSPEED = "deepspeed"
FORMAT = "dstrain checkpoint"
VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What one checkpoint holds.

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
        metrics: of the last evaluation before it, empty where there was none.
        versions: of dstrain and the libraries that it stands on.
        files: path relative to the folder -> size and checksum, of every file but the manifest.
        elsewhere: likewise, of the files of ranks that have another machine's disk; they may be
            copied here.
        layout: of what a resume needs: "slices" by parameter name, or "deepspeed"'s own files.
    """

    step: int
    world_size: int
    stage: int
    precision: str
    resumable: bool
    has_weights: bool
    created: str
    parameters: Mapping[str, tuple[int, ...]]
    optimized: tuple[str, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    layout: str = SLICES
    elsewhere: Mapping[str, FileRecord] = field(default_factory=dict)

    def not_in(self, folder: Path) -> list[str]:
        """The files on other machines' disks that are not in this folder either."""
        return [name for name in self.elsewhere if not (folder / name).exists()]

    @property
    def has_slices(self) -> bool:
        """Whether it can be resumed at any topology."""
        return self.resumable and self.layout == SLICES

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files.values())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it durably, under its name at the very end: this is what makes a checkpoint one.

    Raises:
        OSError: the disk is full, the folder is gone, and so on.
    """
    body = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    body["checksum"] = _checksum(body)
    partial = folder / f".{NAME}.partial"
    write_bytes(partial, (json.dumps(body, indent=1, allow_nan=False) + "\n").encode())
    os.replace(partial, folder / NAME)
    sync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, or a newer dstrain wrote it.
    """
    path = folder / NAME
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            Problem(
                f"{folder} is no dstrain checkpoint",
                f"it has no {NAME}: the save did not finish, or another program wrote it",
                "give a folder that `dstrain checkpoint ls` lists",
            )
        ) from error
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise _damaged(path, f"it does not say {FORMAT!r}")
    version = body.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise CheckpointError(
            Problem(
                f"{path} has version {version}",
                f"this dstrain reads versions up to {VERSION}",
                "use a newer dstrain",
            )
        )
    if body.pop("checksum", None) != _checksum(body):
        raise _damaged(path, "its content does not have the checksum that stands in it")
    names = [*body["files"], *body.get("elsewhere", {})]
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
        raise _damaged(path, "it lists files outside of its folder")
    for key in ("format", "version"):
        body.pop(key)
    for key in ("files", "elsewhere"):
        body[key] = {name: FileRecord(**record) for name, record in body.get(key, {}).items()}
    body["parameters"] = {n: tuple(shape) for n, shape in body["parameters"].items()}
    body["optimized"] = tuple(body["optimized"])
    return Manifest(**body)


def check_files(
    folder: Path,
    manifest: Manifest,
    *,
    share: tuple[int, int] = (0, 1),
    on_file: Callable[[int], object] = lambda num_bytes: None,
) -> list[str]:
    """What is wrong with the files of a checkpoint, a line each; empty when nothing is.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        share: (k, n) looks at every n-th file from the k-th on, so that ranks share the work.
        on_file: called with the bytes of each file that has been looked at.
    """
    found = []
    absent = manifest.not_in(folder)
    copied = {name: r for name, r in manifest.elsewhere.items() if name not in absent}
    records = {**manifest.files, **copied}
    for name, expected in sorted(records.items())[share[0] :: share[1]]:
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected.size:
                found.append(f"{name} has {size} bytes instead of {expected.size}")
            elif record_of(path) != expected:
                found.append(f"{name} does not have its checksum: its content has changed")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror or error}")
        on_file(expected.size)
    return found


def extra_files(folder: Path, manifest: Manifest) -> list[str]:
    """Files in the folder that are no part of the checkpoint."""
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    return sorted(present - set(manifest.files) - set(manifest.elsewhere) - {NAME})


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return f"xxh3:{xxhash.xxh3_64(text.encode()).hexdigest()}"


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(Problem(f"{path} is damaged", why, "use another checkpoint"))
