"""``checkpoint_format="deepspeed"``: DeepSpeed's own files under dstrain's commit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.resumed_runs import EPOCH, check, run
from tests.distributed.runs import losses, make_trainer
from tests.models import tiny_llama

SAVING = {"checkpoint_format": "deepspeed", "save_strategy": "steps", "save_steps": 4, **EPOCH}


@pytest.mark.ranks(2, timeout=240)
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path: Path, rank: int) -> None:
    """Bit for bit at every stage, dropout and all; and every file is in the manifest."""
    from dstrain.checkpoint import read_manifest, verify

    for stage, more in ((0, {}), (1, {"bf16": True}), (2, {}), (3, {"bf16": True})):
        folder = tmp_path / str(stage)
        check(folder, rank, 4, stage=stage, checkpoint_format="deepspeed", **more)
        saved = folder / "whole/checkpoint-4"
        manifest, problems = verify(saved)
        assert (manifest.layout, problems) == ("deepspeed", [])
        there = {str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()}
        assert there == {*read_manifest(saved).files, "manifest.json"}
        assert sum(name.endswith("_states.pt") for name in there) == (1, 3, 3, 4)[stage]
        assert not any("state/" in name and name.endswith(".safetensors") for name in there)


@pytest.mark.ranks(2, timeout=240)
def test_other_runs_are_refused_and_an_import_frees_it(tmp_path: Path, rank: int) -> None:
    """Another stage or format, or nobody's leave to unpickle: each with what to do about it."""
    from dstrain.checkpoint import import_checkpoint
    from dstrain.core.errors import CheckpointError
    from dstrain.core.ranks import barrier

    whole = run(tmp_path / "whole", model=tiny_llama, stage=2, **SAVING)
    start = tmp_path / "whole/checkpoint-4"
    for settings, says in (
        ({"stage": 2, "checkpoint_format": "dstrain"}, "executes the pickles"),
        ({"stage": 1}, "written with ZeRO stage 2, this run has 1"),
        ({"stage": 2, "bf16": True}, "written with precision fp32, this run has bf16"),
    ):
        other = make_trainer(tmp_path / "other", **{**SAVING, **settings})
        with pytest.raises(CheckpointError, match=says) as caught:
            other.train(str(start))
        assert "dstrain checkpoint import" in str(caught.value)
        other.close()
    ours = tmp_path / "ours/checkpoint-4"
    if rank == 0:
        import_checkpoint(start, ours)
    barrier()
    settings = {**SAVING, "checkpoint_format": "dstrain", "model": tiny_llama}
    resumed = run(tmp_path / "again", resume=str(ours), stage=3, **settings)
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=2e-5)
    assert resumed["run"]["position"]["progress"] == whole["run"]["position"]["progress"]


class Factored(torch.optim.Optimizer):
    """Keeps one number per row, which no slice of a parameter can carry."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    rows = p.grad.reshape(p.shape[0], -1).abs().sum(1)
                    state["rows"] = 0.9 * state.get("rows", torch.zeros_like(rows)) + rows
                    scale = (1.0 + state["rows"]).reshape(-1, *[1] * (p.dim() - 1))
                    p.sub_(group["lr"] * p.grad / scale)


@pytest.mark.ranks(2, timeout=120)
def test_an_optimizer_that_slices_cannot_carry(tmp_path: Path, rank: int) -> None:
    """Refused with this way out, which works."""
    from dstrain.core.errors import CheckpointError

    def trained(folder: Path, resume: Any = False, **more: Any) -> Any:
        model = tiny_llama()
        trainer = make_trainer(
            folder, stage=0, model=model, optimizers=(Factored(model.parameters()), None),
            **{**SAVING, **more},
        )  # fmt: skip
        trainer.train(resume)
        return trainer

    with pytest.raises(CheckpointError, match="checkpoint_format to deepspeed"):
        trained(tmp_path / "slices", checkpoint_format="dstrain")
    whole = losses(trained(tmp_path / "whole"))
    resumed = losses(trained(tmp_path / "again", str(tmp_path / "whole/checkpoint-4")))
    assert resumed == whole


@pytest.mark.ranks(2, timeout=120)
def test_a_rank_that_cannot_write_spoils_only_that_save(
    tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """The others do not wait for it for ever, the folder is removed, and the run goes on."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    from dstrain.checkpoint import committed

    save = TorchCheckpointEngine.save

    def full(self: Any, state_dict: Any, path: str) -> Any:
        if rank == 1 and "global_step8" in path:
            raise OSError(28, "No space left on device")
        return save(self, state_dict, path)

    monkeypatch.setattr(TorchCheckpointEngine, "save", full)
    trainer = make_trainer(tmp_path, stage=2, **SAVING, save_failure="continue")
    trainer.train()
    trainer.close()
    assert trainer.state.global_step == 12
    assert [found.step for found in committed(tmp_path)] == [4, 12]
    assert not list(tmp_path.glob(".checkpoint-*"))
    if rank == 0:
        assert "No space left on device" in caplog.text
