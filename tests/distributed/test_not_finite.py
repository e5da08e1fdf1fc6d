"""Losses and gradients that are NaN or infinite, and overflows of fp16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import STAGES, losses, make_trainer, whole_weights


@pytest.mark.ranks(2)
def test_a_nan_loss_stops_the_run_and_names_its_step(tmp_path: Path) -> None:
    """On all ranks alike: at a logging step, or before where the step had to be skipped."""
    from dstrain.core.errors import TrainingError

    for stage in (0, 2):  # DeepSpeed looks at gradients from stage 1 on
        trainer = make_trainer(
            tmp_path, stage=stage, logging_steps=3, callbacks=[_poison(at_step=2)]
        )
        with pytest.raises(TrainingError, match="loss was NaN or infinite at step 2"):
            trainer.train()
        assert not trainer.is_in_train
        trainer.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_gradients_that_are_not_finite_do_not_skip_steps_for_ever(
    policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The loss stays finite, no loss scale is to be found: such a run used to end as if well."""
    from transformers import TrainerCallback

    from dstrain.core.errors import TrainingError

    class Spoil(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                weight = kwargs["model"].lm_head.weight
                hook.append(weight.register_hook(lambda grad: grad * float("inf")))

    hook: list[Any] = []
    trainer = make_trainer(tmp_path, stage=2, nan_loss=policy, callbacks=[Spoil])
    if policy == "stop":
        with pytest.raises(TrainingError, match="step 2 skipped"):
            trainer.train()
        assert trainer.state.global_step == 1
    else:
        trainer.train()
        assert trainer.deepspeed.skipped_steps == 3
        assert ("step 2 skipped" in caplog.text) == trainer.ranks.is_main
    hook[0].remove()
    trainer.close()


@pytest.mark.ranks(2)
def test_a_nan_loss_is_left_out_of_the_log_when_told_to_go_on(tmp_path: Path) -> None:
    """nan_loss='continue' with the filter logs a finite mean; without it there is none."""
    for filtered in (True, False):
        trainer = make_trainer(
            tmp_path,
            logging_steps=4,
            nan_loss="continue",
            logging_nan_inf_filter=filtered,
            callbacks=[_poison(at_step=2)],
        )
        trainer.train()
        assert trainer.state.global_step == 4
        # A mean that is no number is left out of the record, which is JSON.
        assert len(losses(trainer)) == (1 if filtered else 0)
        trainer.close()


def _poison(*, at_step: int) -> Any:
    """Return a callback that makes one rank's weights, and so its loss, NaN before a step."""
    from transformers import TrainerCallback

    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == at_step - 1:
                with torch.no_grad():
                    kwargs["model"].lm_head.weight.mul_(float("nan"))

    return Poison


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_fp16_overflow_skips_the_step_and_is_counted_apart(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and schedule stay; the scale is halved; training then goes on.

    A first scale of 2**40 overflows for sure. The CPU here computes fp16 without saying so.
    """
    from deepspeed.accelerator import get_accelerator
    from transformers import TrainerCallback

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    seen: list[tuple[bool, float]] = []
    previous: dict[str, torch.Tensor] = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = whole_weights(trainer)
            moved = any(not torch.equal(now[n], previous[n]) for n in now) if previous else True
            previous.update(now)
            seen.append((moved, kwargs["optimizer"].param_groups[0]["lr"]))

    config = {"fp16": {"enabled": True, "initial_scale_power": 40, "hysteresis": 1}}
    trainer = make_trainer(
        tmp_path,
        stage=stage,
        deepspeed=config,
        max_steps=40,
        learning_rate=1e-3,
        callbacks=[Watch],
        max_grad_norm=0.0,
    )
    previous.update({n: p.half() for n, p in whole_weights(trainer).items()})
    metrics = trainer.train().metrics
    skipped = int(metrics["train_skipped_steps"])
    assert 10 < skipped < 35
    assert trainer.state.global_step == 40
    # Skipped steps come first here: nothing moved, and the rate stayed at its peak.
    assert [moved for moved, _ in seen[:skipped]] == [False] * skipped
    assert {rate for _, rate in seen[:skipped]} == {1e-3}
    assert seen[skipped][0]
    assert seen[-1][1] == pytest.approx(1e-3 * skipped / 40)
    scales = [e["loss_scale"] for e in trainer.state.log_history if "loss_scale" in e]
    assert scales[skipped - 1] == 2.0 ** (40 - skipped)
    curve = losses(trainer)
    assert curve[-1] < curve[0]
    trainer.close()


@pytest.mark.ranks(2)
def test_fp16_at_stage_zero_follows_stage_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's own stage 0 in fp16 divides by a scale that it never multiplied with."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    curves, norms = [], []
    for stage in (0, 1):
        # Windows of 3 steps make the scale grow in the middle of the run.
        config = {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 3}}
        trainer = make_trainer(tmp_path, stage=stage, deepspeed=config, train=48, max_steps=12)
        trainer.train()
        curves.append(losses(trainer))
        norms.append([e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e])
        trainer.close()
    assert curves[0] == pytest.approx(curves[1], rel=5e-4)
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)


@pytest.mark.ranks(1)
def test_records_are_valid_json_whatever_the_loss(tmp_path: Path) -> None:
    """Python would write a bare NaN, which other readers refuse."""
    trainer = make_trainer(
        tmp_path, nan_loss="continue", callbacks=[_poison(at_step=1)], evaluation=2
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_state()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads((tmp_path / "trainer_state.json").read_text(), parse_constant=refuse)
    trainer.close()
