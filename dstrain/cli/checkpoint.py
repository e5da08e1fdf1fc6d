"""``dstrain checkpoint ls|verify|export``: looks after the checkpoints of a run, in one process."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dstrain.cli.flags import make_parser
from dstrain.core.errors import CheckpointError, ConfigError, Problem, nearest

USAGE = """usage: dstrain checkpoint ACTION ...

actions:
  ls DIR                        step, metrics and size of every checkpoint of a run
  verify DIR                    read every file of a checkpoint, or of all of a run
  export DIR OUT [--dtype D]    the model of a checkpoint as a Hugging Face folder
"""

DAMAGED = 1


def run(words: Sequence[str]) -> int:
    """Run one action; 1 where ``verify`` found damage.

    Raises:
        ConfigError: an unknown action or flag.
        CheckpointError: no checkpoint where one was named.
    """
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    name, rest = words[0], list(words[1:])
    if name not in _ACTIONS:
        close = nearest(name, set(_ACTIONS))
        raise ConfigError(
            Problem(
                f"unknown action {name!r}",
                f"actions are {', '.join(_ACTIONS)}",
                f"did you mean {close!r}?" if close else "",
            )
        )
    parser = make_parser(f"dstrain checkpoint {name}", "", [])
    parser.usage = None
    parser.add_argument("dir", type=Path, help="a run's output_dir, or one checkpoint of it")
    if name == "export":
        parser.add_argument("out", type=Path, help="folder to make")
        parser.add_argument("--dtype", default=None, help="fp32, bf16 or fp16; as trained if left")
        parser.add_argument(
            "--max_shard_bytes", type=int, default=5 * 10**9, help="of one weight file"
        )
    return int(_ACTIONS[name](parser.parse_args(rest)))


def _list(options: Any) -> int:
    from dstrain.checkpoint import committed, read_manifest

    rows = [("step", "size", "state", "ranks", "stage", "metrics", "")]
    found = committed(options.dir)
    best = _best(found[-1].folder) if found else None
    for checkpoint in found:
        try:
            manifest = read_manifest(checkpoint.folder)
        except CheckpointError as error:
            rows.append(
                (str(checkpoint.step), "?", "damaged", "", "", str(error.problems[0].why), "")
            )
            continue
        metrics = " ".join(f"{k}={v:.4g}" for k, v in manifest.metrics.items() if "loss" in k)
        rows.append(
            (
                str(manifest.step),
                _size(manifest.total_bytes),
                "whole" if manifest.resumable else "model only",
                str(manifest.world_size),
                str(manifest.stage),
                metrics or "-",
                "best" if best == checkpoint.folder.name else "",
            )
        )
    unfinished = sorted(p.name for p in options.dir.glob("checkpoint-*") if _is_unfinished(p))
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
    return path.is_dir() and not (path / "manifest.json").exists()


def _best(newest: Path) -> str | None:
    """Name of the best checkpoint by the newest one's records."""
    try:
        best = json.loads((newest / "trainer_state.json").read_text())["best_model_checkpoint"]
    except (OSError, ValueError, KeyError):
        return None
    return None if best is None else Path(best).name


def _verify(options: Any) -> int:
    from tqdm import tqdm

    from dstrain.checkpoint import read_manifest, verify

    status = 0
    for folder in _checkpoints(options.dir):
        try:
            total = read_manifest(folder).total_bytes
            with tqdm(
                total=total, unit="B", unit_scale=True, desc=folder.name, disable=_quiet()
            ) as bar:
                manifest, problems = verify(folder, on_file=bar.update)
        except CheckpointError as error:
            problems, manifest = [str(p) for p in error.problems], None
        if problems:
            status = DAMAGED
            print(f"{folder}: damaged")
            for line in problems:
                print(f"  {line}")
        elif manifest is not None:
            count = f"{len(manifest.files)} files, {_size(manifest.total_bytes)}"
            print(f"{folder}: good ({count}, {len(manifest.parameters)} parameters)")
    return status


def _export(options: Any) -> int:
    from tqdm import tqdm

    from dstrain.checkpoint import export, read_manifest

    (folder,) = _checkpoints(options.dir)[-1:]
    total = len(read_manifest(folder).parameters)
    with tqdm(total=total, unit=" tensors", desc="export", disable=_quiet()) as bar:
        count = export(
            folder,
            options.out,
            dtype=options.dtype,
            shard_bytes=options.max_shard_bytes,
            on_tensor=lambda name, num_bytes: bar.update(),
        )
    print(f"{count} tensors of {folder} are in {options.out}")
    return 0


def _checkpoints(folder: Path) -> list[Path]:
    """The folder itself where it is a checkpoint, else those of the run in it, oldest first.

    Raises:
        CheckpointError: it is neither.
    """
    from dstrain.checkpoint import committed

    if (folder / "manifest.json").exists():
        return [folder]
    found = [checkpoint.folder for checkpoint in committed(folder)]
    if not found:
        raise CheckpointError(
            Problem(
                f"{str(folder)!r} is no checkpoint and has none in it",
                "a checkpoint has a manifest.json",
                "name a run's output_dir, or a checkpoint-N folder in it",
            )
        )
    return found


def _quiet() -> bool:
    return not sys.stderr.isatty()


def _size(num_bytes: int) -> str:
    size, units = float(num_bytes), ["B", "KB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


_ACTIONS = {"ls": _list, "verify": _verify, "export": _export}
