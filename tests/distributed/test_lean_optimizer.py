"""Master weights and optimizer states in bf16: trained, saved, resumed, and at other places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import losses, make_trainer

STEPS, SAVED_AT = 6, 3
LEAN = {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}


def trained(
    folder: Path, *, stage: int, resume: str | None = None, lean: bool = True, **more: Any
) -> Any:
    """Train six steps in bf16, saving after the third."""
    trainer = make_trainer(
        folder, stage=stage, bf16=True, deepspeed=LEAN if lean else None, max_steps=STEPS, train=48,
        evaluation=0, save_strategy="steps", save_steps=SAVED_AT, gradient_accumulation_steps=2,
        **more,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.ranks(2, timeout=300)
def test_it_trains_and_goes_on_at_every_stage_of_zero(tmp_path: Path) -> None:
    """At the same stage to the bit; at another, and with fp32 masters, to bf16's rounding."""
    stages = (1, 2, 3)
    expected = {}
    for stage in stages:
        whole = trained(tmp_path / f"{stage}", stage=stage)
        expected[stage] = losses(whole)
        for shard in whole._engines.training.state.shards():
            kinds = {shard.dtype_of(key) for key in shard.tensor_keys()}
            assert kinds == {torch.bfloat16}, (stage, shard.name)
            assert {"master", "exp_avg", "exp_avg_sq"} <= set(shard.tensor_keys())
        whole.close()
    plain = trained(tmp_path / "plain", stage=2, lean=False)
    usual = losses(plain)
    plain.close()
    for stage in stages:
        assert expected[stage] == pytest.approx(usual, rel=5e-3)
        saved = str(tmp_path / f"{stage}" / f"checkpoint-{SAVED_AT}")
        again = trained(tmp_path / f"{stage} again", stage=stage, resume=saved)
        assert losses(again) == expected[stage]
        again.close()
        other = stages[stage % 3]
        moved = trained(tmp_path / f"{stage} moved", stage=other, resume=saved)
        assert losses(moved) == pytest.approx(expected[stage], rel=2e-3)
        moved.close()
    for name, source, lean in (("to fp32", "3", False), ("from fp32", "plain", True)):
        saved = str(tmp_path / source / f"checkpoint-{SAVED_AT}")
        run = trained(tmp_path / name, stage=2, resume=saved, lean=lean)
        assert losses(run) == pytest.approx(usual, rel=5e-3)
        run.close()


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_to_the_host_it_goes_on_too(stage: int, tmp_path: Path) -> None:
    """DeepSpeedCPUAdam keeps its states in bf16; a run without offload goes on from there."""
    whole = trained(tmp_path / "whole", stage=stage, offload_optimizer="cpu")
    kinds = {
        s.dtype_of(key) for s in whole._engines.training.state.shards() for key in s.tensor_keys()
    }
    assert kinds == {torch.bfloat16}
    whole.close()
    saved = str(tmp_path / "whole" / f"checkpoint-{SAVED_AT}")
    again = trained(tmp_path / "again", stage=stage, resume=saved, offload_optimizer="cpu")
    assert losses(again) == losses(whole)
    again.close()
    moved = trained(tmp_path / "moved", stage=stage, resume=saved)
    assert losses(moved) == pytest.approx(losses(whole), rel=2e-3)
    moved.close()
