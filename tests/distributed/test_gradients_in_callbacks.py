"""Callbacks and gradients: clipped before on_pre_optimizer_step at stage 0, in parts at others."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from tests.distributed.runs import whole_weights
from tests.distributed.test_gradients_in_losses import STEPS, Classifier, data

LIMIT = 0.1  # far below the norm


def callback(seen: list[float]) -> Any:
    from transformers import TrainerCallback

    class Twice(TrainerCallback):
        """Doubles gradients as they are found."""

        def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            seen.append(float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0)
            for grad in grads:
                grad.mul_(2)

    return Twice


def trainer_of(folder: Path, stage: int, callbacks: Any) -> Any:
    from dstrain import Trainer, TrainingArguments

    args = TrainingArguments(
        str(folder), zero_stage=str(stage), max_steps=STEPS, learning_rate=0.5, optim="sgd",
        per_device_train_batch_size=4, lr_scheduler_type="constant", report_to="none",
        save_strategy="no", logging_steps=1, disable_tqdm=True, max_grad_norm=LIMIT,
        remove_unused_columns=False,
    )  # fmt: skip
    return Trainer(
        Classifier(), args, data_collator=default_collate, train_dataset=data(), callbacks=callbacks
    )


@functools.cache
def by_hand() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Norms and weights of plain torch, which clips, lets the gradients double, and steps."""
    model, norms = Classifier(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(STEPS):
        model(**default_collate(data()))["loss"].backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)))
        for p in model.parameters():
            assert p.grad is not None
            p.grad.mul_(2)
        optimizer.step()
        optimizer.zero_grad()
    return norms, model.state_dict()


@pytest.mark.ranks(2, timeout=240)
def test_at_stage_0_a_callback_gets_clipped_gradients_and_its_change_is_final(
    tmp_path: Path,
) -> None:
    """As in transformers; clipping after it would undo the change."""
    seen: list[float] = []
    trainer = trainer_of(tmp_path, 0, [callback(seen)])
    trainer.train()
    norms, weights = by_hand()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(norms, rel=1e-4)
    assert seen == pytest.approx([LIMIT] * STEPS, rel=1e-3)
    for name, weight in whole_weights(trainer).items():
        torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=1e-4)
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_in_parts_are_said_once(
    stage: int, tmp_path: Path, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[float] = []
    trainer = trainer_of(tmp_path, stage, [callback(seen)])
    with caplog.at_level(logging.WARNING, logger="dstrain"):
        trainer.train()
    said = [m for m in caplog.messages if m.startswith("Twice has on_pre_optimizer_step")]
    assert len(said) == (rank == 0 and stage > 0)
    assert (max(seen) == 0.0) == (stage > 0)
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_the_warning_names_reads_gradients(stage: int, tmp_path: Path) -> None:
    """Before clipping, which is DeepSpeed's at these stages."""
    from transformers import TrainerCallback

    norms: list[float] = []

    class Read(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            from deepspeed.utils import safe_get_full_grad

            grads = [safe_get_full_grad(p) for p in model.parameters()]
            norms.append(float(torch.nn.utils.get_total_norm(grads)))

    trainer = trainer_of(tmp_path, stage, [Read])
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert norms == pytest.approx(logged, rel=1e-4)
    assert norms[0] == pytest.approx(by_hand()[0][0], rel=1e-4)
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
def test_a_callback_without_this_event_is_told_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import TrainerCallback

    class Other(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            pass

    trainer = trainer_of(tmp_path, 2, [Other])
    with caplog.at_level(logging.WARNING, logger="dstrain"):
        trainer.train()
    assert not [m for m in caplog.messages if "on_pre_optimizer_step" in m]
    trainer.close()
