"""Checkpoints whose state is in DeepSpeed's own layout: which runs may read them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dstrain.checkpoint.manifest import DEEPSPEED, Manifest
from dstrain.core.errors import CheckpointError, Problem, raise_problems
from dstrain.engine import Unpickling

LATEST = "latest"


@dataclass(frozen=True)
class Reader:
    """The facts of a run that resumes, by which DeepSpeed can load a checkpoint or not.

    Attributes:
        unpickles: whether the user chose DeepSpeed's layout, and with it that pickles are executed.
        world_size: its ranks.
        stage: its ZeRO stage.
        precision: its number format.
    """

    unpickles: bool
    world_size: int
    stage: int
    precision: str


def tag_of(step: int) -> str:
    """Name the folder of DeepSpeed's files inside of a checkpoint, as DeepSpeed names it."""
    return f"global_step{step}"


def check_readable(folder: Path, manifest: Manifest, reader: Reader) -> None:
    """Refuse early what DeepSpeed could not load, or what nobody allowed it to load.

    Raises:
        CheckpointError: with every reason; never for a checkpoint of slices.
    """
    if manifest.layout == DEEPSPEED:
        unpickling(folder, manifest, reader)


def unpickling(folder: Path, manifest: Manifest, reader: Reader) -> Unpickling:
    """Allow DeepSpeed's loader, which executes pickles, to read a checkpoint.

    Raises:
        CheckpointError: the user did not choose it, or it could not read this one; with every
            reason.
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
    # DeepSpeed reads what it finds there; what the manifest does not list has no checksum.
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
