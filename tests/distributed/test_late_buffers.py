"""State that a module makes in its first forward pass comes back in a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


class Averages(nn.Module):
    """Subtracts a running average that it has not before its first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("average", None)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        hidden = torch.tanh(self.inner(x))
        if self.training:
            mean = hidden.detach().mean(0)
            self.average = mean if self.average is None else 0.5 * self.average + 0.5 * mean
        logits = self.head(hidden if self.average is None else hidden - self.average)
        return nn.functional.cross_entropy(logits, labels), logits


class Counting(nn.Module):
    """Scales by the number of its training passes, which it keeps as extra state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.passes = 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        self.passes += self.training
        logits = self.head(torch.tanh(self.inner(x)) * (1 + 0.1 * self.passes))
        return nn.functional.cross_entropy(logits, labels), logits

    def get_extra_state(self) -> Any:
        return {"passes": self.passes, "history": [torch.tensor(self.passes)]}

    def set_extra_state(self, state: Any) -> None:
        self.passes = state["passes"]


def rows() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{"x": torch.randn(4), "labels": torch.tensor(i % 3)} for i in range(16)]


class Scaled(Counting):
    """Its extra state is a tensor, which safetensors files hold."""

    def get_extra_state(self) -> Any:
        return torch.tensor(self.passes)

    def set_extra_state(self, state: Any) -> None:
        self.passes = int(state)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("kind", [Averages, Scaled])
def test_the_best_model_comes_with_its_state(kind: Any, tmp_path: Path) -> None:
    """From a checkpoint of the model alone, whose files are all there is."""
    from dstrain import Trainer, TrainingArguments

    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-2,
        greater_is_better=True,  # the worst one, which is not the last
        save_only_model=True,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(kind(), args, train_dataset=rows(), eval_dataset=rows())
    trainer.train()
    best = trainer.state.best_metric
    assert trainer.state.best_model_checkpoint.endswith("-2"), "else nothing has to be taken back"
    assert trainer.evaluate()["eval_loss"] == best
    trainer.close()


@pytest.mark.ranks(2)
def test_each_rank_gets_a_late_buffer_of_its_own_back(tmp_path: Path) -> None:
    """Where ranks are told not to share theirs."""
    from dstrain import Trainer, TrainingArguments

    def averages(resume: str | None) -> tuple[list[float], torch.Tensor]:
        args = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=4,
            save_steps=2,
            logging_steps=1,
            ddp_broadcast_buffers=False,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(Averages(), args, train_dataset=rows())
        trainer.train(resume_from_checkpoint=resume)
        history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        average = trainer.model.average.clone()
        trainer.close()
        return history, average

    losses, average = averages(None)
    resumed, again = averages(str(tmp_path / "checkpoint-2"))
    assert resumed == losses
    assert torch.equal(again, average)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", ["2", "3"])
@pytest.mark.parametrize("kind", [Averages, Counting])
def test_state_beside_parameters_is_restored(kind: Any, stage: str, tmp_path: Path) -> None:
    """A buffer that is None in a fresh model, and what a module keeps outside of buffers."""
    from dstrain import Trainer, TrainingArguments

    def losses(resume: str | None) -> list[float]:
        args = TrainingArguments(
            str(tmp_path),
            zero_stage=stage,
            per_device_train_batch_size=4,
            max_steps=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_steps=2,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(kind(), args, train_dataset=rows())
        trainer.train(resume_from_checkpoint=resume)
        history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.close()
        return history

    straight = losses(None)
    assert losses(str(tmp_path / "checkpoint-2")) == straight
