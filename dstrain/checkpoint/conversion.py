"""Conversion of a dstrain checkpoint to DeepSpeed's universal checkpoint format.

That format has a file for each parameter and kind of state, so DeepSpeed loads it at any number of
ranks and at its stages 1, 2 and 3: ``{"checkpoint": {"load_universal": true}}`` in its config, then
``engine.load_checkpoint(out)``. The content of each file follows the code of DeepSpeed 0.19.8 that
reads it (``base_optimizer.py``, ``zero/stage3.py``, ``engine.py``). Memory holds one tensor at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dstrain.checkpoint import content, new_folder
from dstrain.checkpoint.export import assembled, slice_files
from dstrain.checkpoint.manifest import Manifest, read_manifest, require_files
from dstrain.checkpoint.run_files import read_run
from dstrain.checkpoint.slice_index import SliceIndex, check_coverage, read_index
from dstrain.checkpoint.versions import versions
from dstrain.core.errors import CheckpointError, Problem
from dstrain.core.files import make_durable, write_bytes
from dstrain.engine import MASTER

# DeepSpeed loads as many groups as the shorter of two lists has, and silently leaves the rest of
# its groups as they are; so the file gets more groups than any run has.
_MOST_GROUPS = 64
_ADAM = {"exp_avg", "exp_avg_sq"}


@dataclass(frozen=True)
class Converted:
    """Result of a conversion.

    Attributes:
        step: optimizer steps of the run.
        num_parameters: number of parameters with optimizer state.
        remarks: sentences about state that DeepSpeed does not load from the converted folder.
    """

    step: int
    num_parameters: int
    remarks: tuple[str, ...]


def convert(
    folder: Path,
    out: Path,
    *,
    on_tensor: Callable[[str, int], object] = lambda name, size: None,
    on_file: Callable[[int], object] = lambda num_bytes: None,
) -> Converted:
    """Write a checkpoint in DeepSpeed's universal format.

    All files to be read are verified first, so that no output is made from a damaged checkpoint.

    Args:
        folder: a committed checkpoint.
        out: a folder to make.
        on_tensor: called with name and bytes of each tensor that is written.
        on_file: called with the bytes of each file that has been verified.

    Raises:
        CheckpointError: the checkpoint has no slices or is damaged, or ``out`` is not empty.
    """
    manifest = read_manifest(folder)
    new_folder.check_new(out)
    if manifest.has_slices:
        names = [*slice_files(folder, manifest), content.RUN]
        require_files(folder, manifest, names, on_file=on_file)
    index = read_index(folder, manifest)  # raises where there are no slices
    if missing := check_coverage(index, manifest):
        raise CheckpointError(Problem(f"{folder} is damaged", "\n".join(missing)))
    engine = read_run(folder)["engine"]
    kinds: set[str] = set()
    with new_folder.filled_atomically(out) as staging:
        tag = f"global_step{manifest.step}_universal"
        for name in manifest.optimized:
            kinds |= _write_parameter(index, manifest, name, staging / tag / "zero", on_tensor)
        _save(_optimizer_state(engine, index, manifest), staging / tag / "zero/optimizer_state.pt")
        model = _model_state(engine, manifest)
        # DeepSpeed reads the first file at stages 1 and 2, the second at stage 3.
        for file in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
            _save(model, staging / tag / file)
        write_bytes(staging / "latest_universal", tag.encode())
    remarks = _remarks(manifest, kinds)
    return Converted(manifest.step, len(manifest.optimized), tuple(remarks))


def _write_parameter(
    index: SliceIndex,
    manifest: Manifest,
    name: str,
    zero: Path,
    on_tensor: Callable[[str, int], object],
) -> set[str]:
    """Write a parameter's folder with a file per kind of tensor; return the optimizer's kinds."""
    if Path(name).name != name:
        raise CheckpointError(Problem(f"a parameter is called {name!r}", "that is no file name"))
    folder, kinds = zero / name, set()
    # DeepSpeed splits the tensor along a dimension even into one piece, so it needs a dimension.
    shape = manifest.parameters[name] or (1,)
    for key in index.keys_of(name):
        stored = assembled(index, key, name, shape, torch.float32)
        _save({"param": stored.load(), "cat_dim": 0}, folder / _file(key))
        on_tensor(stored.name, stored.num_bytes)
        kinds.add(key)
    if "step" in index.scalars.get(name, {}):
        _save(_step(index.scalars[name]["step"]), folder / "step.pt")
    return kinds - {MASTER}


def _file(key: str) -> str:
    return "fp32.pt" if key == MASTER else f"{key}.pt"


def _step(number: Any) -> Any:
    """Return a step count in the type of its optimizer: a tensor for torch's, else an integer."""
    return torch.tensor(number) if isinstance(number, float) else number


def _optimizer_state(
    engine: Mapping[str, Any], index: SliceIndex, manifest: Manifest
) -> dict[str, Any]:
    groups = [dict(group) for group in engine["groups"]] or [{}]
    # Stage 3 applies the first group's values to all groups, so it gets only values common to all.
    shared = {k: v for k, v in groups[0].items() if all(g.get(k) == v for g in groups)}
    numbers = [index.scalars.get(name, {}) for name in manifest.optimized]
    steps = [found["step"] for found in numbers if "step" in found]
    return {
        "ds_version": versions().get("deepspeed", "0.19.8"),
        "param_groups": groups + [shared] * (_MOST_GROUPS - len(groups)),
        "optimizer_state_dict": {
            "state": {0: {"step": _step(max(steps)) if steps else 0}},
            "param_groups": [shared],
        },
    }


def _model_state(engine: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    counters = engine["counters"]
    return {
        "module": {},  # DeepSpeed takes weights from the files of the parameters
        "optimizer": None,
        "buffer_names": [],
        "param_shapes": [
            {name: torch.Size(manifest.parameters[name]) for name in manifest.optimized}
        ],
        "lr_scheduler": engine["schedule"],
        "global_steps": counters["global_steps"],
        "global_samples": counters["global_samples"],
        "skipped_steps": counters["skipped_steps"],
        "dp_world_size": manifest.world_size,
        "mp_world_size": 1,
        "ds_version": versions().get("deepspeed", "0.19.8"),
        "dstrain": {"step": manifest.step, "metrics": dict(manifest.metrics)},
    }


def _remarks(manifest: Manifest, kinds: set[str]) -> list[str]:
    remarks = []
    frozen = len(manifest.parameters) - len(manifest.optimized)
    parts = [f"{frozen} frozen parameters"] if frozen else []
    parts += ["buffers"] if content.BUFFERS in manifest.files else []
    if parts:
        remarks.append(
            f"{' and '.join(parts)} are not in it, as DeepSpeed does not load them from this "
            "format: build the model from `dstrain checkpoint export`"
        )
    if manifest.precision == "fp16":
        remarks.append("the loss scale is not in it: DeepSpeed begins with that of its config")
    if kinds and kinds != _ADAM:
        remarks.append(
            f"DeepSpeed's stage 3 loads the state of Adam only, this has {sorted(kinds)}: use "
            "stage 1 or 2"
        )
    remarks.append("the optimizer must have the parameter groups of the run that wrote it")
    return remarks


def _save(value: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)
    make_durable(path)
