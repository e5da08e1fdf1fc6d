"""A loss of a user's own whose first batches do not tell what it is a mean over."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import default_collate

from tests.distributed.runs import trainer_with_loss

CLEAN = 10  # global batches whose masks leave nothing out
STEPS = 14
BATCH = 8


def rows() -> list[dict[str, torch.Tensor]]:
    """Eight rows for each step; from the eleventh on, masks leave out some elements of the last."""
    draw = torch.Generator().manual_seed(3)
    made = []
    for index in range(BATCH * STEPS):
        mask = torch.ones(6, dtype=torch.long)
        if index >= BATCH * CLEAN and index % 8 == 5:
            mask[: 1 + index % 5] = 0
        labels = torch.randint(1, 5, (6,), generator=draw)
        made.append({
            "x": torch.randn(6, 4, generator=draw), "labels": labels, "mask": mask,
        })  # fmt: skip
    return made


class Tagger(nn.Module):
    """Classes of a few features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(x)
        return scores


def masked_mean(model: Any, batch: Any) -> torch.Tensor:
    """The mean over what the mask keeps."""
    kept = batch["mask"].bool()
    return functional.cross_entropy(model(batch["x"])[kept], batch["labels"][kept])


def divided_sum(model: Any, batch: Any) -> torch.Tensor:
    """The same by hand."""
    each = functional.cross_entropy(
        model(batch["x"]).transpose(1, 2), batch["labels"], reduction="none"
    )
    return (each * batch["mask"]).sum() / batch["mask"].sum()


def weighted_mean(model: Any, batch: Any) -> torch.Tensor:
    """A mean that no count of targets explains, so that micro-batches weigh by their samples."""
    weights = torch.tensor([0.1, 1.0, 2.0, 3.0, 4.0])
    scores = model(batch["x"]).transpose(1, 2)
    return functional.cross_entropy(scores, batch["labels"], weight=weights)


LOSSES = {"selected": masked_mean, "divided": divided_sum}


def by_hand(loss_of: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of plain torch, in one process with whole batches."""
    model, found = Tagger(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    data = rows()
    for step in range(STEPS):
        loss = loss_of(model, default_collate(data[BATCH * step : BATCH * (step + 1)]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    return found, {name: p.detach() for name, p in model.named_parameters()}


def trainer_of(folder: Path, loss_of: Any, *, data: Any = None, **settings: Any) -> Any:
    from dstrain import TrainingArguments

    arguments = {
        "zero_stage": "2", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4,
        "max_steps": STEPS, "save_strategy": "no",
    } | settings  # fmt: skip
    args = TrainingArguments(
        str(folder), learning_rate=1e-2, lr_scheduler_type="constant", report_to="none",
        logging_steps=1, disable_tqdm=True, remove_unused_columns=False, max_grad_norm=0.0,
        train_sampling_strategy="sequential", label_names=["labels"], **arguments,
    )  # fmt: skip
    own = trainer_with_loss(lambda trainer, model, inputs: (loss_of(model, inputs), None))
    return own(
        Tagger(), args, data_collator=default_collate, train_dataset=data or rows(),
        eval_dataset=rows(),
    )  # fmt: skip


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("way", list(LOSSES))
def test_a_mask_that_comes_late_is_found_in_the_step_that_has_it(way: str, tmp_path: Path) -> None:
    """The loss of that step too: its telling micro-batch is seen before any is weighted."""
    trainer = trainer_of(tmp_path, LOSSES[way])
    trainer.train()
    wanted, trained = by_hand(LOSSES[way])
    torch.testing.assert_close(losses(trainer), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights(trainer), trained, rtol=1e-4, atol=1e-5)
    whole = float(LOSSES[way](trainer.model, default_collate(rows())))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(whole, rel=1e-5)
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize(
    ("loss_of", "stop"),
    [(masked_mean, 2), (masked_mean, CLEAN - 1), (weighted_mean, CLEAN + 1)],
)
def test_a_resume_knows_what_the_run_had_found_out(
    loss_of: Any, stop: int, rank: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit for bit, before and after the rule was settled with rivals, and by samples."""
    whole = trainer_of(tmp_path / "whole", loss_of)
    whole.train()
    first = trainer_of(tmp_path / "parts", loss_of, save_strategy="steps", save_steps=stop)
    first.train()
    assert losses(first) == losses(whole)
    again = trainer_of(tmp_path / "parts", loss_of)
    with caplog.at_level(logging.WARNING):
        again.train(str(tmp_path / "parts" / f"checkpoint-{stop}"))
    assert losses(again) == losses(whole)
    for name, weight in weights(whole).items():
        assert torch.equal(weights(again)[name], weight), name
    assert "is not any more" not in caplog.text
    by_samples = loss_of is weighted_mean
    assert ("weighted by their samples" in caplog.text) == (by_samples and rank == 0)
    for trainer in (whole, first, again):
        trainer.close()


@pytest.mark.ranks(2, timeout=240)
def test_a_loss_that_changes_its_form_is_noticed(
    rank: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the 64th step; how it is weighted is then found out again."""
    data = [row for _ in range(6) for row in rows()]
    for index, row in enumerate(data):
        data[index] = row | {"mask": torch.tensor([1] * (1 + index % 6) + [0] * (5 - index % 6))}
    trainer: Any = None

    def curriculum(model: Any, batch: Any) -> torch.Tensor:
        if trainer.is_in_train and trainer.state.global_step < 20:
            return masked_mean(model, batch | {"mask": torch.ones_like(batch["mask"])})
        return masked_mean(model, batch)

    trainer = trainer_of(
        tmp_path, curriculum, data=data, max_steps=68, gradient_accumulation_steps=2
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    noticed = [record for record in caplog.records if "is not any more" in record.message]
    assert len(noticed) == (rank == 0)
    assert trainer.targets.rule.parts[0].mask == "mask"
    trainer.close()
