"""Checks that a run may read a checkpoint whose state is in DeepSpeed's own layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dstrain.checkpoint.manifest import DEEPSPEED, Manifest
from dstrain.core.errors import CheckpointError, Problem, raise_problems
from dstrain.engine import Unpickling

LATEST = "latest"


@dataclass(frozen=True)
class Reader:
    """Facts of a resuming run that decide whether DeepSpeed can load a checkpoint into it.

    Attributes:
        unpickles: whether the user chose DeepSpeed's layout, and so allowed executing pickles.
        world_size: number of ranks.
        stage: ZeRO stage.
        precision: "fp32", "bf16" or "fp16".
    """

    unpickles: bool
    world_size: int
    stage: int
    precision: str


def tag_of(step: int) -> str:
    """Return the name of the folder with DeepSpeed's files in a checkpoint, as DeepSpeed does."""
    return f"global_step{step}"


def check_readable(folder: Path, manifest: Manifest, reader: Reader) -> None:
    """Refuse early a checkpoint in DeepSpeed's layout that it cannot, or may not, load.

    Does nothing for a checkpoint of slices.

    Raises:
        CheckpointError: DeepSpeed cannot or may not load it; the message has every reason.
    """
    if manifest.layout == DEEPSPEED:
        unpickling(folder, manifest, reader)


def unpickling(folder: Path, manifest: Manifest, reader: Reader) -> Unpickling:
    """Permit DeepSpeed's loader, which executes pickles, to read a checkpoint.

    Returns:
        The permission that ``load_native`` requires.

    Raises:
        CheckpointError: the user did not choose DeepSpeed's layout, or DeepSpeed cannot load this
            checkpoint into this run; the message has every reason.
    """
    convert = f"convert it for any topology: dstrain checkpoint import {folder} OUT"
    if not reader.unpickles:
        raise CheckpointError(
            Problem(
                f"{folder} is in DeepSpeed's own layout",
                "reading that executes the pickles in it",
                f"set checkpoint_format to deepspeed if you trust it, or {convert}",
            )
        )
    problems = [
        Problem(
            f"{folder} was written with {what} {there}, this run has {here}",
            "DeepSpeed's own layout is read at the topology that wrote it only",
            f"use {what} {there}, or {convert}",
        )
        for what, there, here in (
            ("ranks =", manifest.world_size, reader.world_size),
            ("ZeRO stage", manifest.stage, reader.stage),
            ("precision", manifest.precision, reader.precision),
        )
        if there != here
    ]
    tag = tag_of(manifest.step)
    if manifest.layout != DEEPSPEED or not manifest.resumable:
        problems.append(Problem(f"{folder} does not hold what DeepSpeed resumes from"))
    # DeepSpeed reads every file it finds there; a file that is not listed has no checksum.
    there = sorted(str(p.relative_to(folder)) for p in (folder / tag).rglob("*") if not p.is_dir())
    if unknown := [name for name in there if not manifest.has(name)]:
        problems.append(
            Problem(
                f"{folder} has a file that is no part of it: {unknown[0]}",
                "DeepSpeed would read it",
                "remove it, or use another checkpoint",
            )
        )
    raise_problems(problems, error=CheckpointError)
    return Unpickling(folder, tag)
