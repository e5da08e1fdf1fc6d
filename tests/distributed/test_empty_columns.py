"""A loss over label columns, one of them without a target: the error names that column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from tests.distributed.runs import trainer_with_loss
from tests.distributed.test_formats import SEED


class TwoHeads(nn.Module):
    """Two classifiers on one body, each with labels of its own, some of which are not known."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.body, self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.tanh(self.body(x))
        return {"one": self.one(hidden), "two": self.two(hidden)}


def mean(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits, labels)


def mean_of_some(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    summed = nn.functional.cross_entropy(logits, labels, reduction="sum")
    return summed / (labels != -100).sum().clamp(min=1)


def rows(*, unknown: bool) -> list[dict[str, torch.Tensor]]:
    """Twelve rows; of those of the second step on rank 1 the second label is not known."""
    draw = torch.Generator().manual_seed(SEED)
    made = [
        {
            "x": torch.randn(4, generator=draw),
            "one": torch.randint(0, 3, (), generator=draw),
            "two": torch.randint(0, 3, (), generator=draw),
        }
        for _ in range(12)
    ]
    for row in made[6:8] if unknown else ():
        row["two"] = torch.tensor(-100)
    return made


def trainer_of(folder: Path, stage: int, loss: Any, data: Any, **settings: Any) -> Any:
    from dstrain import TrainingArguments

    def both(trainer: Any, model: Any, inputs: Any) -> tuple[Any, Any]:
        outputs = model(inputs["x"])
        return loss(outputs["one"], inputs["one"]) + loss(outputs["two"], inputs["two"]), outputs

    args = TrainingArguments(
        str(folder), zero_stage=str(stage), max_steps=3, learning_rate=1e-3, report_to="none",
        per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, label_names=["one", "two"],
        train_sampling_strategy="sequential", **settings,
    )  # fmt: skip
    return trainer_with_loss(both)(
        TwoHeads(), args, data_collator=default_collate, train_dataset=data
    )


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize(("stage", "logging_steps"), [(0, 3), (2, 1), (2, 3)])
def test_the_column_without_a_target_is_named(
    stage: int, logging_steps: int, tmp_path: Path
) -> None:
    """On both ranks, though only one of them had it."""
    from dstrain.core.errors import TrainingError

    trainer = trainer_of(tmp_path, stage, mean, rows(unknown=True), logging_steps=logging_steps)
    with pytest.raises(TrainingError, match=r"(?s)step 2; two held no target.*max\(1,") as found:
        trainer.train()
    assert "0/0" in str(found.value)
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
def test_what_the_error_says_to_do_helps(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 2, mean_of_some, rows(unknown=True), logging_steps=1)
    trainer.train()
    assert trainer.state.global_step == 3
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
def test_a_loss_that_is_no_number_for_another_reason_blames_no_column(tmp_path: Path) -> None:
    from dstrain.core.errors import TrainingError

    data = rows(unknown=False)
    data[6]["x"][0] = float("inf")
    trainer = trainer_of(tmp_path, 2, lambda a, b: mean(a / 0, b), data, logging_steps=1)
    with pytest.raises(TrainingError, match="lower learning_rate, add warm-up") as found:
        trainer.train()
    assert "held no target" not in str(found.value)
    trainer.close()
