"""Actions of ``dstrain checkpoint`` that only read: ls, verify, diff."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from dstrain.cli.checkpoint_tools import checkpoints, quiet, size
from dstrain.core.errors import CheckpointError, Problem

DAMAGED = 1
DIFFERENT = 1
_STATES = {
    (True, "slices"): "whole",
    (True, "deepspeed"): "DeepSpeed's",
    (False, "slices"): "model only",
    (False, "deepspeed"): "model only",
}
SHOWN_TENSORS = 10
_WIDEST = 60


def ls(options: Namespace) -> int:
    """Print a table of the checkpoints of a run.

    Raises:
        CheckpointError: there is no such folder.
    """
    from dstrain.checkpoint import best_of, committed, named, read_manifest

    if not options.dir.is_dir():
        why = "it is a file" if options.dir.exists() else "there is no such folder"
        raise CheckpointError(
            Problem(f"{str(options.dir)!r} has no checkpoints", why, "name a run's output_dir")
        )
    rows = [("step", "size", "state", "ranks", "stage", "metrics", "")]
    found = committed(options.dir)
    best = best_of(options.dir)
    for checkpoint in found:
        try:
            manifest = read_manifest(checkpoint.folder)
        except CheckpointError as error:
            rows.append(
                (str(checkpoint.step), "?", "damaged", "", "", str(error.problems[0].why), "")
            )
            continue
        figures = {k: manifest.figure(k) for k in manifest.metrics if "loss" in k}
        metrics = " ".join(f"{k}={v:.4g}" for k, v in figures.items() if v is not None)
        rows.append(
            (
                str(manifest.step),
                size(manifest.total_bytes),
                _STATES[manifest.resumable, manifest.layout],
                str(manifest.world_size),
                str(manifest.stage),
                metrics or "-",
                "best" if best == checkpoint.folder else "",
            )
        )
    unfinished = [f.folder.name for f in named(options.dir) if _is_unfinished(f.folder)]
    if len(rows) > 1:
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
    else:
        print(f"no checkpoint in {options.dir}")
    for name in unfinished:
        print(f"{name}: not committed (it has no manifest.json)")
    return 0


def _is_unfinished(path: Path) -> bool:
    return not (path / "manifest.json").exists()


def verify(options: Namespace) -> int:
    """Check every file and parameter of checkpoints; return 1 if one is damaged, else 0."""
    from tqdm import tqdm

    from dstrain import checkpoint
    from dstrain.checkpoint import extra_files, read_manifest

    status = 0
    for folder in checkpoints(options.dir):
        try:
            total = read_manifest(folder).total_bytes
            with tqdm(
                total=total, unit="B", unit_scale=True, desc=folder.name, disable=quiet()
            ) as bar:
                manifest, problems = checkpoint.verify(folder, on_file=bar.update)
        except CheckpointError as error:
            problems, manifest = [str(p) for p in error.problems], None
        if problems:
            status = DAMAGED
            print(f"{folder}: damaged")
            for line in problems:
                print(f"  {line}")
        elif manifest is not None:
            if extra := extra_files(folder, manifest):
                print(f"{folder}: files that are no part of it: {', '.join(extra)}")
            count = f"{len(manifest.files)} files, {size(manifest.total_bytes)}"
            print(f"{folder}: good ({count}, {len(manifest.parameters)} parameters)")
    return status


def diff(options: Namespace) -> int:
    """Print the differences between two checkpoints; return 1 if there are any, else 0."""
    from tqdm import tqdm

    from dstrain.checkpoint import compare

    first, second = (checkpoints(folder)[-1] for folder in (options.first, options.second))
    with (
        tqdm(unit="B", unit_scale=True, desc="verify", disable=quiet()) as verified,
        tqdm(unit=" tensors", desc="diff", disable=quiet()) as bar,
    ):
        found = compare(first, second, on_tensor=lambda name: bar.update(), on_file=verified.update)
    print(f"A  {first}\nB  {second}")
    title = None
    for group, name, a, b in found.values:
        if group != title:
            print(f"\n{group}")
            title = group
        print(f"  {name}: {_short(a)} | {_short(b)}")
    by_key: dict[str, list[Any]] = {}
    for tensor in found.tensors:
        by_key.setdefault(tensor.key, []).append(tensor)
    for key, tensors in by_key.items():
        tensors.sort(key=lambda t: -t.largest)
        shown = tensors if options.all else tensors[:SHOWN_TENSORS]
        print(f"\n{key}: {len(tensors)} tensors have other values, at most {tensors[0].largest:g}")
        for t in shown:
            print(f"  {t.name}: {t.different} of {t.numel} elements, at most {t.largest:g}")
        if len(shown) < len(tensors):
            print(f"  and {len(tensors) - len(shown)} more (--all)")
    if found:
        print(f"\n{found.num_compared - len(found.tensors)} tensors are the same bit for bit")
        return DIFFERENT
    print(f"nothing differs: {found.num_compared} tensors are the same bit for bit")
    return 0


def _short(value: Any) -> str:
    text = "-" if value is None else json.dumps(value, default=str)
    return text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."
