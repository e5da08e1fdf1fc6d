"""Machines without a shared disk. Two of them are played by two ranks that see other folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.resumed_runs import EPOCH, assert_same, noisy_llama, run
from tests.distributed.runs import make_trainer, whole_weights


@pytest.fixture(autouse=True)
def _a_machine_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_SIZE", "1")


def settings_of(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "stage": stage, "save_strategy": "steps", "save_steps": 4, "save_on_each_node": True,
        **EPOCH, **more,
    }  # fmt: skip


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize(
    ("stage", "more"),
    [(0, {}), (1, {"save_async": False}), (2, {"bf16": True}), (3, {})],
    ids=str,
)
def test_each_machine_has_its_part_and_the_run_goes_on(
    stage: int, more: dict[str, Any], tmp_path: Path, rank: int
) -> None:
    """Bit for bit, and each machine's folder is a model of its own and verifies by itself."""
    from transformers import AutoModelForCausalLM

    from dstrain.checkpoint import read_manifest, verify

    here = tmp_path / f"machine{rank}"
    whole = run(here / "whole", **settings_of(stage, **more))
    folder = here / "whole/checkpoint-4"
    assert verify(folder)[1] == []
    manifest = read_manifest(folder)
    states = sorted(name for name in manifest.files if name.startswith("state/rank"))
    assert states == [f"state/rank-0000{rank}.json", f"state/rank-0000{rank}.safetensors"]
    assert sorted(manifest.elsewhere) == [
        name.replace(f"0{rank}.", f"0{1 - rank}.") for name in states
    ]
    loaded = AutoModelForCausalLM.from_pretrained(here / "whole/checkpoint-8", dtype="auto")
    assert loaded.num_parameters() > 0
    shutil.copytree(folder, here / "again/checkpoint-4")
    assert_same(run(here / "again", resume=True, **settings_of(stage, **more)), whole)


@pytest.mark.ranks(2, timeout=300)
def test_the_final_model_and_the_best_are_on_every_machine(tmp_path: Path, rank: int) -> None:
    """What is saved once per machine: the model, the state; and what is kept."""
    from safetensors.torch import load_file

    from dstrain.checkpoint import committed

    here = tmp_path / f"machine{rank}"
    trainer = make_trainer(
        here,
        **settings_of(
            3, save_total_limit=1, load_best_model_at_end=True, learning_rate=0.0, max_steps=4,
            eval_strategy="steps", eval_steps=1, save_steps=1,
        ),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    # Nothing is learned, so the first evaluation stays the best.
    assert trainer.state.best_model_checkpoint == str(here / "checkpoint-1")
    assert [f.step for f in committed(here)] == [1, 4]
    saved = [load_file(at / "model.safetensors") for at in (here, here / "checkpoint-4")]
    for name, weights in whole_weights(trainer).items():
        assert all(torch.equal(part[name], weights) for part in saved), name
    assert (here / "trainer_state.json").exists()
    trainer.close()


@pytest.mark.ranks(2, timeout=300)
def test_a_checkpoint_counts_where_every_machine_has_its_part(
    tmp_path: Path, rank: int, caplog: Any
) -> None:
    """The newest is gone on one machine; the one before it is of another save there."""
    from dstrain.checkpoint import committed
    from dstrain.checkpoint.find import choose_checkpoint
    from dstrain.core.errors import CheckpointError
    from dstrain.core.ranks import Ranks, barrier

    here = tmp_path / f"machine{rank}"
    settings = settings_of(2, save_steps=2, max_steps=4)
    run(here / "one", **settings)
    run(here / "two", **{**settings, "seed": 7})
    assert [f.step for f in committed(here / "one")] == [2, 4]
    facts = Ranks(rank, 0, 2, 1)
    chosen = choose_checkpoint(True, here / "one", facts, on_each_node=True)
    assert chosen is not None
    assert chosen[1].step == 4
    if rank == 1:
        shutil.rmtree(here / "one/checkpoint-4")
    barrier()
    chosen = choose_checkpoint("auto", here / "one", facts, on_each_node=True)
    assert chosen is not None
    assert chosen[1].step == 2
    if rank == 0:
        assert "checkpoint-4 is skipped: on the machine of rank 1: " in caplog.text
    if rank == 1:
        shutil.rmtree(here / "one/checkpoint-2")
        shutil.copytree(here / "two/checkpoint-2", here / "one/checkpoint-2")
    barrier()
    with pytest.raises(CheckpointError, match="parts of different saves"):
        choose_checkpoint(True, here / "one", facts, on_each_node=True)
    # A machine that took the other one's place has not what its rank needs.
    other = tmp_path / f"machine{1 - rank}"
    with pytest.raises(CheckpointError, match="state/rank-0000.* is missing"):
        choose_checkpoint(str(other / "two/checkpoint-2"), here, facts, on_each_node=True)


@pytest.mark.ranks(2, timeout=300)
def test_another_stage_needs_the_parts_of_all_machines_in_one_folder(
    tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused with that remedy; then done, on a disk that the machines share."""
    from dstrain.core.errors import CheckpointError
    from dstrain.core.ranks import barrier

    here = tmp_path / f"machine{rank}"
    whole = run(here, **settings_of(2))
    trainer = make_trainer(here / "not", model=noisy_llama(), **settings_of(0))
    with pytest.raises(CheckpointError, match=r"(?s)another machine has.*copy the files in state/"):
        trainer.train(str(here / "checkpoint-4"))
    trainer.close()
    shared = tmp_path / "machine0/checkpoint-4"
    if rank == 1:
        for path in (here / "checkpoint-4/state").glob("rank-*"):
            shutil.copy(path, shared / "state")
    barrier()
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    again = {**settings_of(0), "save_on_each_node": False}
    resumed = run(tmp_path / "shared", resume=str(shared), **again)
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=2e-5)


@pytest.mark.ranks(2, timeout=300)
def test_machines_that_share_the_disk_after_all(tmp_path: Path) -> None:
    """They would write over each other's files."""
    from dstrain.core.errors import CheckpointError

    trainer = make_trainer(tmp_path, model=noisy_llama(), **settings_of(2))
    with pytest.raises(CheckpointError, match="leave save_on_each_node out"):
        trainer.train()
    trainer.close()


@pytest.mark.ranks(2, timeout=300)
def test_a_machine_that_cannot_write_stops_all(
    tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No half of a checkpoint is ever resumed."""
    from dstrain.checkpoint import choose_checkpoint, committed, folders
    from dstrain.core.errors import CheckpointError
    from dstrain.core.ranks import Ranks

    here = tmp_path / f"machine{rank}"
    trainer = make_trainer(here, model=noisy_llama(), **settings_of(2, save_steps=2, max_steps=4))
    real = folders.commit

    def refuse(staging: Path, output_dir: Path, step: int) -> Path:
        if rank == 1:
            raise OSError(30, "Read-only file system")
        return real(staging, output_dir, step)

    monkeypatch.setattr(folders, "commit", refuse)
    with pytest.raises(CheckpointError, match="rank 1: the commit failed.*Read-only"):
        trainer.train()
    trainer.close()
    assert not list(here.glob(".checkpoint*"))
    # The other one had its part in place by then; a run that goes on does not take it.
    assert [f.step for f in committed(here)] == ([2] if rank == 0 else [])
    with pytest.raises(CheckpointError, match="checkpoint-2: on the machine of rank 1"):
        choose_checkpoint("auto", here, Ranks(rank, 0, 2, 1), on_each_node=True)
