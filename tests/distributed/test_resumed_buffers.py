"""Buffers that training changes, in checkpoints and in runs that resume from them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.buffers import STATE, TOPOLOGIES, assert_equal, buffers_of, on_all_ranks
from tests.distributed.forked import run_job
from tests.distributed.runs import history, losses, whole_weights
from tests.statistics import Statistics, trainer_of


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("layout", ["dstrain", "deepspeed"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_run_is_the_run_that_never_stopped(
    stage: int, layout: str, apart: bool, tmp_path: Path, rank: int
) -> None:
    """Each rank gets its own buffers back, also those that are in no state_dict."""
    from dstrain.core.ranks import barrier

    settings: dict[str, Any] = {
        "save_strategy": "steps", "save_steps": 3, "checkpoint_format": layout,
        "ddp_broadcast_buffers": False if apart else None, "eval_strategy": "steps",
        "eval_steps": 1,
    }  # fmt: skip
    whole = trainer_of(tmp_path / "whole", Statistics(), stage, **settings)
    whole.train()
    weights, buffers = whole_weights(whole), buffers_of(whole.model)
    one, two = on_all_ranks(whole.model)
    assert {n for n in STATE if one[n] != two[n]} == (
        STATE - {"count", "norm.num_batches_tracked"} if apart else set()
    )
    whole.close()
    start = tmp_path / "again/checkpoint-3"
    if rank == 0:
        shutil.copytree(tmp_path / "whole/checkpoint-3", start)
    barrier()
    assert (start / "state/rank-00001-buffers.safetensors").exists() is apart
    again = trainer_of(tmp_path / "again", Statistics(), stage, **settings)
    again.train(True)
    assert history(again) == history(whole)
    assert_equal(whole_weights(again), weights)
    assert_equal(buffers_of(again.model), buffers)
    again.close()


@pytest.mark.slow
def test_another_topology_gets_the_main_ranks(tmp_path: Path) -> None:
    """From two ranks to one and three; what ranks had for themselves is the main rank's."""
    found = run_job("buffers", tmp_path, timeout=240)
    for name in TOPOLOGIES:
        saved, begun = found[name]
        for buffers in begun:
            for buffer in STATE:
                assert buffers[buffer] == saved[buffer], (name, buffer)


@pytest.mark.ranks(2, timeout=240)
def test_the_best_model_comes_back_with_its_buffers(tmp_path: Path) -> None:
    """Each rank's own where they differ."""
    for apart in (False, True):
        folder = tmp_path / str(apart)
        kept: dict[int, dict[str, torch.Tensor]] = {}

        from transformers import TrainerCallback

        class Keep(TrainerCallback):
            def on_save(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
                kept[state.global_step] = buffers_of(kw["model"])  # noqa: B023

        trainer = trainer_of(
            folder, Statistics(replaces=False), 2, learning_rate=0.3, eval_strategy="steps",
            eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
            callbacks=[Keep()], ddp_broadcast_buffers=not apart,
        )  # fmt: skip
        trainer.train()
        best = trainer.state.best_global_step
        assert best < 6
        assert_equal(buffers_of(trainer.model), kept[best])
        expected = trainer.state.best_metric
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
        trainer.close()


@pytest.mark.ranks(2, timeout=240)
def test_older_checkpoints_still_load(tmp_path: Path, rank: int) -> None:
    """Give all ranks the main rank's buffers where a checkpoint has no files of other buffers."""
    from dstrain.checkpoint import read_manifest
    from dstrain.checkpoint.manifest import write_manifest
    from dstrain.core.files import record_of
    from dstrain.core.ranks import barrier

    trainer = trainer_of(
        tmp_path, Statistics(), 2, save_strategy="steps", save_steps=3, save_async=False
    )
    trainer.train()
    trainer.close()
    old = tmp_path / "checkpoint-3"
    if rank == 0:
        run = json.loads((old / "state/run.json").read_text())
        del run["engine"]["buffers"], run["formats"]
        (old / "state/run.json").write_text(json.dumps(run))
        (old / "state/other_buffers.safetensors").unlink()
        manifest = read_manifest(old)
        files = {n: r for n, r in manifest.files.items() if "other_buffers" not in n}
        files["state/run.json"] = record_of(old / "state/run.json")
        write_manifest(old, replace(manifest, files=files))
    barrier()
    again = trainer_of(tmp_path / "again", Statistics(), 2)
    again.train(str(old))
    assert len(losses(again)) == 6
    assert set(again._engines.training.buffers.found()["state"]) == STATE
    again.close()


@pytest.mark.ranks(2, timeout=240)
def test_caches_are_said_not_to_be_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rank: int
) -> None:
    """Once; buffers that are in no state_dict and are replaced by another tensor."""
    trainer = trainer_of(tmp_path, Statistics(), 2, save_strategy="steps", save_steps=1)
    trainer.train()
    said = [r.message for r in caplog.records if "taken for caches" in r.message]
    assert len(said) == (rank == 0)
    assert all("1 buffers that are in no state_dict" in line and "(cache)" in line for line in said)
    trainer.close()
