"""Evaluations by the arguments: when they come, their format, and loaders that are kept."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from tests.distributed.runs import make_trainer
from tests.models import RaggedTokens


@pytest.mark.ranks(1)
def test_loaders_with_processes_are_kept_by_name(tmp_path: Path) -> None:
    """Persistent workers outlive an evaluation; another dataset never gets a kept loader."""
    sets = {"a": RaggedTokens(2, seed=99), "b": RaggedTokens(3, seed=1)}
    trainer = make_trainer(
        tmp_path,
        evaluation=sets,
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
    )
    assert trainer.get_eval_dataloader("a") is trainer.get_eval_dataloader("a")
    assert trainer.get_eval_dataloader("b") is not trainer.get_eval_dataloader("a")
    assert len(trainer.get_eval_dataloader(sets["b"]).dataset) == 3
    once, again = trainer.evaluate(), trainer.evaluate()
    assert once["eval_a_loss"] == again["eval_a_loss"]
    trainer.eval_dataset = {"a": sets["b"]}
    assert trainer.evaluate()["eval_a_loss"] == once["eval_b_loss"]
    trainer.close()
    assert not multiprocessing.active_children()


@pytest.mark.ranks(2)
def test_evaluations_come_when_the_arguments_say(tmp_path: Path) -> None:
    """eval_on_start, eval_steps as a share of all steps, eval_delay."""
    for settings, expected in (
        ({"eval_steps": 0.3, "eval_on_start": True}, [0, 3, 6, 9, 10]),
        ({"eval_steps": 2, "eval_delay": 5}, [6, 8, 10]),
        ({"eval_strategy": "epoch", "eval_delay": 2}, [8, 10]),
    ):
        trainer = make_trainer(
            tmp_path,
            **{"eval_strategy": "steps", "max_steps": 10, "logging_steps": 50, **settings},
        )
        trainer.train()
        history = trainer.state.log_history
        assert [e["step"] for e in history if "eval_loss" in e] == expected
        trainer.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [0, 2])
def test_full_evaluation_in_16_bits_leaves_training_alone(stage: int, tmp_path: Path) -> None:
    """Weights, their memory and the curve stay as they were; at stage 3 it is refused."""
    from dstrain.core.errors import ConfigError

    curves = []
    for full in (True, False):
        trainer = make_trainer(tmp_path, stage=stage, bf16_full_eval=full)
        seen: list[torch.dtype] = []
        trainer.model.lm_head.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.dtype))
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        places = [p.data_ptr() for p in trainer.model.parameters()]
        seen.clear()
        trainer.evaluate()
        assert set(seen) == {torch.bfloat16 if full else torch.float32}
        assert [p.data_ptr() for p in trainer.model.parameters()] == places
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        trainer.train()
        curves.append(([e["loss"] for e in trainer.state.log_history if "loss" in e], before))
        trainer.close()
    assert curves[0][0] == curves[1][0]
    assert curves[0][1] != curves[1][1]
    assert curves[0][1] == pytest.approx(curves[1][1], rel=1e-2)
    with pytest.raises(ConfigError, match="bf16_full_eval=True at ZeRO stage 3"):
        make_trainer(tmp_path, stage=3, bf16_full_eval=True)
    make_trainer(tmp_path, stage=3, bf16_full_eval=True, bf16=True).close()
