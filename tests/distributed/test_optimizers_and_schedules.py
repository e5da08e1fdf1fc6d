"""Optimizers and schedules: those of the arguments, of the DeepSpeed config and of the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import STAGES, losses, make_trainer
from tests.models import tiny_llama


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_cpu_offload_trains(stage: int, tmp_path: Path) -> None:
    """The optimizer on the host follows the curve of the one on the device."""
    plain = make_trainer(tmp_path, stage=stage)
    plain.train()
    plain.close()
    offloaded = make_trainer(
        tmp_path,
        stage=stage,
        offload_optimizer="cpu",
        offload_param="cpu" if stage == 3 else "none",
    )
    offloaded.train()
    assert type(offloaded.deepspeed.optimizer.optimizer).__name__ == "DeepSpeedCPUAdam"
    assert losses(offloaded) == pytest.approx(losses(plain), rel=1e-4)
    offloaded.close()


@pytest.mark.ranks(2)
def test_two_parameter_groups_and_the_schedule_of_transformers(tmp_path: Path) -> None:
    """Norms are not decayed; warm-up starts at 0 and each step uses the documented rate."""
    rates: list[float] = []

    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            rates.append(kw["optimizer"].param_groups[0]["lr"])

    trainer = make_trainer(
        tmp_path, train=20, weight_decay=0.1, warmup_steps=2, callbacks=[Recorder]
    )
    trainer.train()
    assert [g["weight_decay"] for g in trainer.optimizer.param_groups] == [0.1, 0.0]
    # 5 steps, 2 of warm-up: linear to the peak, then to 0.
    assert rates == pytest.approx([0.0, 5e-4, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    logged = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert logged == pytest.approx(rates)
    trainer.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_a_users_own_optimizer_and_schedule_run(stage: int, tmp_path: Path) -> None:
    """They are used as given, never replaced."""
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=100)
    trainer = make_trainer(tmp_path, stage=stage, model=model, optimizers=(optimizer, schedule))
    trainer.train()
    basic = trainer.deepspeed.basic_optimizer
    assert isinstance(basic, torch.optim.SGD)
    assert trainer.deepspeed.lr_scheduler is schedule
    logged = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert set(logged) == {0.025}
    trainer.close()


@pytest.mark.ranks(2)
def test_a_schedule_of_deepspeeds_own_is_filled_and_used(tmp_path: Path) -> None:
    """Its "auto" values are known only when training starts; the Trainer is built before that."""
    config = {
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
                "total_num_steps": "auto",
                "warmup_type": "linear",
            },
        }
    }
    trainer = make_trainer(tmp_path, train=40, warmup_steps=4, deepspeed=config)
    trainer.train()
    assert trainer.resolved.values["scheduler.params.total_num_steps"] == 10
    assert trainer.resolved.values["scheduler.params.warmup_num_steps"] == 4
    assert type(trainer.lr_scheduler).__name__ == "WarmupDecayLR"
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    # DeepSpeed's own schedule uses the minimum rate twice, and peaks one step late.
    assert rates[:6] == pytest.approx([0.0, 0.0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])
    trainer.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_a_users_own_optimizer_trains_twice(stage: int, tmp_path: Path) -> None:
    """DeepSpeed puts flat tensors into its groups; the next engine needs the parameters again."""
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = make_trainer(tmp_path, stage=stage, model=model, optimizers=(optimizer, None))
    trainer.train()
    trainer.train()
    curve = losses(trainer)
    assert curve[4] < curve[0]
    assert not any(key.startswith("optimizer.") for key in trainer.resolved.values)
    trainer.close()


@pytest.mark.ranks(1)
def test_a_passed_object_and_a_section_of_the_config_are_a_conflict(tmp_path: Path) -> None:
    """Whichever lost would be lost silently."""
    from dstrain.core.errors import ConfigError

    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    config = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}
    with pytest.raises(ConfigError, match=r"(?s)'optimizer', and.*'scheduler', and"):
        make_trainer(tmp_path, model=model, deepspeed=config, optimizers=(optimizer, schedule))
