"""Comparing checkpoints and removing old ones, on small ones without a model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.checkpoint import best_of, compare, folders, holding, prune
from dstrain.checkpoint.content import BUFFERS, RUN, slice_file
from dstrain.checkpoint.manifest import Manifest, read_manifest, write_manifest
from dstrain.core.errors import CheckpointError
from dstrain.core.files import write_json
from dstrain.models import Stored, write_tensor_file
from tests.unit.checkpoint.small import make_checkpoint, run_values

NUMEL = 5000


def made(
    output_dir: Path,
    *,
    cuts: tuple[int, ...] = (0, 1700, NUMEL),
    change: Any = None,
    rate: float = 0.1,
    buffer: float = 1.0,
    **manifest: Any,
) -> Path:
    """Make a checkpoint of step 4 of one parameter, of as many ranks as runs between ``cuts``."""
    staging = folders.new_staging(output_dir, 4)
    values = {"master": torch.arange(NUMEL, dtype=torch.float32)}
    values["exp_avg"] = -values["master"]
    if change is not None:
        change(values)
    files = {}
    runs = list(zip(cuts, cuts[1:], strict=False))
    for rank, (start, stop) in enumerate(runs):
        tensors = [Stored.of(f"{key}/w", v[start:stop]) for key, v in values.items()]
        metadata = {
            "spans": json.dumps({"w": [start, stop - start]}),
            "scalars": json.dumps({"w": {"step": 4}}),
        }
        name = slice_file(rank)
        files[name] = write_tensor_file(staging / name, tensors, metadata)
    run = run_values(groups=[{"lr": rate}]) | {"position": {"meters": [{"seconds": rate}]}}
    files[RUN] = write_json(staging / RUN, run)
    stored = [Stored.of("seen", torch.full((3,), buffer))]
    files[BUFFERS] = write_tensor_file(staging / BUFFERS, stored)
    content: dict[str, Any] = {
        "step": 4, "world_size": len(runs), "stage": 2, "precision": "bf16", "resumable": True,
        "has_weights": False, "created": "", "parameters": {"w": (NUMEL // 10, 10)},
        "optimized": ("w",), "files": files, **manifest,
    }  # fmt: skip
    write_manifest(staging, Manifest(**content))
    return folders.commit(staging, output_dir, 4)


def test_other_cuts_of_the_same_values_are_no_difference(tmp_path):
    """Only the number of ranks differs, whatever the pieces are."""
    found = compare(
        made(tmp_path / "a"), made(tmp_path / "b", cuts=(0, 10, 1800, 1801, NUMEL), world_size=4)
    )
    assert found.values == (("checkpoint", "world_size", 2, 4),)
    assert found.tensors == ()
    assert found.num_compared == 3


def test_one_changed_value_is_found_with_its_size(tmp_path):
    def change(values: dict[str, torch.Tensor]) -> None:
        values["exp_avg"][1750] += 0.5
        values["exp_avg"][3] += 0.25

    (found,) = compare(
        made(tmp_path / "a"), made(tmp_path / "b", cuts=(0, 900, NUMEL), change=change)
    ).tensors
    assert dataclasses.astuple(found) == ("exp_avg", "w", NUMEL, 2, 0.5)


def test_not_a_number_is_an_infinite_difference_but_not_to_itself(tmp_path):
    def change(values: dict[str, torch.Tensor]) -> None:
        values["master"][7] = float("nan")

    spoilt = [made(tmp_path / name, change=change) for name in "ab"]
    assert not compare(*spoilt)
    (found,) = compare(made(tmp_path / "c"), spoilt[0]).tensors
    assert found.largest == float("inf")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rate": 0.2}, ("state of the run", "engine.groups.0.lr", 0.1, 0.2)),
        ({"metrics": {"eval_loss": 2.0}}, ("metrics", "eval_loss", None, 2.0)),
        ({"precision": "fp32"}, ("checkpoint", "precision", "bf16", "fp32")),
        ({"optimized": ()}, ("frozen or trained", "w", "trained", None)),
        (
            {"parameters": {"w": (10, NUMEL // 10)}},
            ("shapes", "w", [NUMEL // 10, 10], [10, NUMEL // 10]),
        ),
        (
            {"change": lambda values: values.pop("exp_avg")},
            ("kinds of state", "w", ["exp_avg", "master"], ["master"]),
        ),
    ],
    ids=str,
)
def test_what_is_no_tensor_is_compared_too(tmp_path, change, says):
    found = compare(made(tmp_path / "a"), made(tmp_path / "b", **change))
    assert found.values == (says,)
    assert found.tensors == ()


def test_buffers_are_compared(tmp_path):
    (found,) = compare(made(tmp_path / "a"), made(tmp_path / "b", buffer=1.5)).tensors
    assert dataclasses.astuple(found) == ("buffer", "seen", 3, 3, 0.5)


# --- prune ---------------------------------------------------------------------------------------


def steps(output_dir: Path) -> list[int]:
    return [found.step for found in folders.committed(output_dir)]


def with_best(output_dir: Path, best: str | None) -> None:
    """Let the newest checkpoint name the best one, and stay whole."""
    folder = folders.committed(output_dir)[-1].folder
    record = write_json(folder / "trainer_state.json", {"best_model_checkpoint": best})
    manifest = read_manifest(folder)
    files = {**manifest.files, "trainer_state.json": record}
    write_manifest(folder, dataclasses.replace(manifest, files=files))


def test_prune_leaves_the_newest_the_best_and_what_is_read(tmp_path):
    for step in (2, 4, 6, 8, 10):
        make_checkpoint(tmp_path, step)
    with_best(tmp_path, "elsewhere/before/it/was/moved/checkpoint-4")
    assert best_of(tmp_path) == tmp_path / "checkpoint-4"
    planned = prune(tmp_path, keep=2, dry_run=True)
    assert steps(tmp_path) == [2, 4, 6, 8, 10]
    assert [found.step for found in planned.removed] == [2, 6, 8]
    with holding(tmp_path / "checkpoint-2"):
        done = prune(tmp_path, keep=2)
    assert steps(tmp_path) == [2, 4, 10]
    assert [found.step for found in done.removed] == [6, 8]
    assert {found.step: why for found, why in done.kept} == {
        2: "a process is reading it",
        4: "best",
        10: "newest",
    }
    prune(tmp_path, keep=1)
    assert steps(tmp_path) == [4, 10]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_prune_removes_nothing_while_the_newest_is_damaged(tmp_path):
    for step in (2, 4):
        make_checkpoint(tmp_path, step)
    path = tmp_path / "checkpoint-4/state/rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"checkpoint-4 is damaged.*(?s:.*)bytes instead of"):
        prune(tmp_path, keep=1)
    assert steps(tmp_path) == [2, 4]


def test_prune_refuses_to_remove_everything(tmp_path):
    make_checkpoint(tmp_path, 2)
    with pytest.raises(CheckpointError, match="at least the newest"):
        prune(tmp_path, keep=0)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        prune(tmp_path / "nothing", keep=1)
