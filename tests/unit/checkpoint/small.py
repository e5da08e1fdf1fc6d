"""A small checkpoint without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dstrain.checkpoint import folders
from dstrain.checkpoint.content import RUN
from dstrain.checkpoint.manifest import (
    Manifest,
    write_manifest,
)
from dstrain.core.files import write_json
from dstrain.models.tensor_file import Stored, write_tensor_file


def run_values(step: int = 0, **engine: Any) -> dict[str, Any]:
    """Return the least that a ``run.json`` says."""
    counters = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
    return {
        "engine": {
            "counters": dict.fromkeys(counters, step),
            "loss_scale": None,
            "groups": [{"lr": 0.1}],
            "schedule": None,
            **engine,
        },
        "position": {},
        "global_batch_size": 4,
    }


def make_checkpoint(output_dir: Path, step: int, *, size: int = 5000) -> Path:
    """Make a committed checkpoint of a model with one parameter, written by two ranks."""
    staging = folders.new_staging(output_dir, step)
    values = torch.arange(size, dtype=torch.float32)
    cut = size // 3
    files = {}
    for rank, (start, stop) in enumerate([(0, cut), (cut, size)]):
        name = f"state/rank-{rank:05d}.safetensors"
        tensors = [
            Stored.of("master/w", values[start:stop]),
            Stored.of("exp_avg/w", -values[start:stop]),
        ]
        metadata = {
            "spans": json.dumps({"w": [start, stop - start]}),
            "scalars": json.dumps({"w": {"step": step}}),
        }
        files[name] = write_tensor_file(staging / name, tensors, metadata)
    files[RUN] = write_json(staging / RUN, run_values(step))
    files["trainer_state.json"] = write_json(staging / "trainer_state.json", {"step": step})
    manifest = Manifest(
        step=step,
        world_size=2,
        stage=2,
        precision="bf16",
        resumable=True,
        has_weights=False,
        created="2026-01-01T00:00:00+00:00",
        parameters={"w": (size // 10, 10)},
        optimized=("w",),
        metrics={"eval_loss": 1.5},
        files=files,
    )
    write_manifest(staging, manifest)
    return folders.commit(staging, output_dir, step)
