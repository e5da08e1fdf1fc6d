"""A callback that freezes or unfreezes layers during training is told what becomes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import STAGES, make_trainer, whole_weights
from tests.models import tiny_llama


def layers(trainable: bool, at_step: int) -> Any:
    """Return a callback that sets requires_grad of the first layer at a step."""
    from transformers import TrainerCallback

    from dstrain.engine import gathered

    class Change(TrainerCallback):
        weights: Any = None

        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            if state.global_step == at_step:
                for parameter in model.model.layers[0].parameters():
                    parameter.requires_grad_(trainable)
                with gathered(model.parameters()):
                    self.weights = model.model.layers[0].mlp.up_proj.weight.detach().clone()

    return Change()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "during training" in r.getMessage()]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_unfreezing_during_training_is_told_once(
    stage: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, rank: int
) -> None:
    """With how many and which; they do not move, as it says."""
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    trainer = make_trainer(
        tmp_path, stage=stage, model=model, train=24, evaluation=0, callbacks=[layers(True, 2)]
    )
    before = {n: p.clone() for n, p in tiny_llama().named_parameters()}
    trainer.train()
    after = whole_weights(trainer)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    frozen = {name for name in before if name.startswith("model.layers.0.")}
    assert moved == set(before) - frozen
    told = warnings_of(caplog)
    assert len(told) == (rank == 0)
    if told:
        assert f"{len(frozen)} parameters were unfrozen" in told[0]
        assert "model.layers.0.self_attn.q_proj.weight" in told[0]
    trainer.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_freezing_during_training_is_told_once(
    stage: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, rank: int
) -> None:
    """From stage 1 on the optimizer goes on moving them."""
    change = layers(False, 2)
    trainer = make_trainer(tmp_path, stage=stage, train=24, evaluation=0, callbacks=[change])
    trainer.train()
    stays = torch.equal(whole_weights(trainer)["model.layers.0.mlp.up_proj.weight"], change.weights)
    assert stays == (stage == 0)
    told = warnings_of(caplog)
    assert len(told) == (rank == 0)
    if told:
        assert "9 parameters were frozen" in told[0]
    trainer.close()


@pytest.mark.ranks(1)
def test_nothing_is_told_of_what_was_frozen_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor of what was unfrozen between two trainings."""
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    trainer = make_trainer(
        tmp_path, model=model, train=8, evaluation=0, callbacks=[change := layers(False, 2)]
    )
    trainer.train()
    trainer.remove_callback(change)
    assert warnings_of(caplog) == []
    model.model.layers[0].requires_grad_(True)
    trainer.train()  # with an engine that was built for them
    assert warnings_of(caplog) == []
    assert trainer.get_num_trainable_parameters() == sum(p.numel() for p in model.parameters())
    trainer.close()
