"""A loss that asks for gradients itself is torch's: penalties of gradients, adversarial inputs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from tests.distributed.runs import trainer_with_loss, whole_weights

STEPS, ROWS = 3, 8


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.second(torch.tanh(self.first(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@functools.cache
def data() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(6, generator=draw), "labels": torch.randint(0, 3, (), generator=draw)}
        for _ in range(ROWS)
    ]


def penalty(model: Any, inputs: Any) -> tuple[torch.Tensor, Any]:
    """The gradient of the outputs with respect to the inputs is part of what is learned."""
    x = inputs["x"].clone().requires_grad_(True)
    outputs = model(x, inputs["labels"])
    (slope,) = torch.autograd.grad(outputs["logits"].sum(), x, create_graph=True)
    return outputs["loss"] + slope.pow(2).sum(1).mean(), outputs


def adversarial(model: Any, inputs: Any) -> tuple[torch.Tensor, Any]:
    """Inputs are moved along the gradient of a first pass; both passes are learned from."""
    x = inputs["x"].clone().requires_grad_(True)
    outputs = model(x, inputs["labels"])
    summed = outputs["loss"] * len(x)
    (slope,) = torch.autograd.grad(summed, x, retain_graph=True)
    return outputs["loss"] + model(x.detach() + 3 * slope, inputs["labels"])["loss"], outputs


def of_a_parameter(model: Any, inputs: Any) -> tuple[torch.Tensor, Any]:
    """The loss is divided by a number that follows from the gradient of a parameter."""
    outputs = model(inputs["x"], inputs["labels"])
    bias = getattr(model, "module", model).second.bias
    (slope,) = torch.autograd.grad(outputs["loss"], bias, retain_graph=True)
    return outputs["loss"] * (2 + 0 * slope.sum()), outputs


LOSSES = {f.__name__: f for f in (penalty, adversarial, of_a_parameter)}


@functools.cache
def by_hand(way: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of plain torch, on all of the data in every step."""
    model, found = Classifier(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, eps=1e-3)
    for _ in range(STEPS):
        loss, _ = LOSSES[way](model, default_collate(data()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, model.state_dict()


def trainer_of(folder: Path, way: str, stage: int, accumulation: int) -> Any:
    from dstrain import TrainingArguments

    args = TrainingArguments(
        str(folder), zero_stage=str(stage), max_steps=STEPS, learning_rate=1e-2,
        per_device_train_batch_size=ROWS // 2 // accumulation, adam_epsilon=1e-3,
        gradient_accumulation_steps=accumulation, lr_scheduler_type="constant", report_to="none",
        save_strategy="no", logging_steps=1, disable_tqdm=True, max_grad_norm=0.0,
        remove_unused_columns=False,
    )  # fmt: skip
    return trainer_with_loss(lambda trainer, model, inputs: LOSSES[way](model, inputs))(
        Classifier(), args, data_collator=default_collate, train_dataset=data()
    )


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("way", "stage"),
    [
        *[("penalty", stage) for stage in (0, 1, 2)],
        *[("adversarial", stage) for stage in (0, 1, 2, 3)],
        *[("of_a_parameter", stage) for stage in (0, 1, 2)],
    ],
)
def test_a_loss_may_ask_for_gradients(
    way: str, stage: int, accumulation: int, tmp_path: Path
) -> None:
    """Also where gradients are accumulated, which DeepSpeed takes for a reason to divide them."""
    trainer = trainer_of(tmp_path, way, stage, accumulation)
    trainer.train()
    wanted, weights = by_hand(way)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(wanted, rel=1e-5)
    for name, weight in whole_weights(trainer).items():
        torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=1e-4)
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
def test_a_gradient_of_a_gradient_at_stage_3_is_said_to_be_none(tmp_path: Path) -> None:
    from dstrain.core.errors import TrainingError

    trainer = trainer_of(tmp_path, "penalty", 3, 1)
    with pytest.raises(TrainingError, match=r"(?s)gradient of a gradient .* zero_stage to 2"):
        trainer.train()
    trainer.close()
