"""Optimizer state that checkpoints cannot hold is an error after one step, not when saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.runs import losses, make_trainer

FACTORED: dict[str, Any] = {"stage": 0, "optim": "adafactor", "train": 32, "max_steps": 6}


@pytest.mark.ranks(2, timeout=300)
def test_factored_state_is_refused_after_the_first_step(tmp_path: Path) -> None:
    """On all ranks, although each writes other parameters."""
    from dstrain.core.errors import CheckpointError

    trainer = make_trainer(tmp_path, **FACTORED, save_strategy="steps", save_steps=5)
    with pytest.raises(CheckpointError, match=r"(?s)exp_avg_sq_row.*zero_stage to 1") as caught:
        trainer.train()
    assert trainer.state.global_step <= 1, caught.value
    trainer.close()


@pytest.mark.ranks(2, timeout=300)
def test_without_checkpoints_it_trains_with_a_warning(
    tmp_path: Path, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Signals are ignored: not even that."""
    found = []
    for settings in ({}, {"preemption": "ignore"}):
        caplog.clear()
        trainer = make_trainer(tmp_path, **FACTORED, **settings)
        assert trainer.train().global_step == 6
        found.append(sum("will not end this run" in r.getMessage() for r in caplog.records))
        trainer.close()
    assert found == [rank == 0, 0]


@pytest.mark.ranks(2, timeout=300)
def test_the_remedies_work(tmp_path: Path) -> None:
    """Both of them save, and go on as if the run had never stopped."""
    for name, settings in (
        ("stage", {"stage": 1}),
        ("format", {"checkpoint_format": "deepspeed"}),
    ):
        settings = {**FACTORED, "save_strategy": "steps", "save_steps": 3, **settings}
        trainer = make_trainer(tmp_path / name, **settings)
        trainer.train()
        whole = losses(trainer)
        trainer.close()
        trainer = make_trainer(tmp_path / name, **settings)
        trainer.train(str(tmp_path / name / "checkpoint-3"))
        assert losses(trainer) == whole, name
        trainer.close()
