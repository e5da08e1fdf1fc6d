"""A loss that reads weights itself: torch's at stages 0 to 2, and at 3 an error that says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from tests.distributed.runs import trainer_with_loss, whole_weights
from tests.distributed.test_gradients_in_losses import STEPS, Classifier, data


class Fused(torch.autograd.Function):
    """A linear layer and a loss in one, as kernels for large vocabularies are."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        return (hidden @ weight.t()).pow(2).mean()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, weight = ctx.saved_tensors
        return torch.zeros_like(hidden), torch.zeros_like(weight)


def l2(module: Any, outputs: Any, inputs: Any) -> torch.Tensor:
    return 1e-2 * sum(p.pow(2).sum() for p in module.parameters())


def through_data(module: Any, outputs: Any, inputs: Any) -> torch.Tensor:
    return outputs["loss"] * 0 + module.first.weight.data.float().abs().sum()


def norms(module: Any, outputs: Any, inputs: Any) -> torch.Tensor:
    return torch.nn.utils.get_total_norm(list(module.parameters()))


def linear(module: Any, outputs: Any, inputs: Any) -> torch.Tensor:
    return nn.functional.linear(inputs["x"], module.first.weight).mean()


def transposed(module: Any, outputs: Any, inputs: Any) -> torch.Tensor:
    return (inputs["x"] @ module.first.weight.T).mean()


def fused(module: Any, outputs: Any, inputs: Any) -> torch.Tensor:
    result: torch.Tensor = Fused.apply(inputs["x"], module.first.weight)
    return result


def only_asks(module: Any, outputs: Any, inputs: Any) -> torch.Tensor:
    """What a parameter is, of which kind and where, is known at any time."""
    for name, p in module.named_parameters():
        assert p.requires_grad, name
        assert p.dtype.is_floating_point
        assert p.device.type == inputs["x"].device.type
        p.shape, p.dim(), p.numel(), p.size(), p.is_contiguous(), p.grad, p.ndim, repr(p.dtype)
        inputs["x"].to(p), inputs["x"].type_as(p), p.new_zeros(3).sum(), p.detach(), hash(p)
        p.is_floating_point(), torch.is_tensor(p), p.data, p.element_size(), p is p
    return torch.zeros((), dtype=next(module.parameters()).dtype)


def of_a_module(module: Any, outputs: Any, inputs: Any) -> torch.Tensor:
    """A module that is called gathers its weights."""
    result: torch.Tensor = module.first(inputs["x"]).pow(2).mean()
    return result


def gathered(module: Any, outputs: Any, inputs: Any) -> torch.Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())), torch.no_grad():
        return 1e-2 * sum(p.pow(2).sum() for p in module.parameters())


def trainer_of(folder: Path, extra: Any, stage: int) -> Any:
    from dstrain import TrainingArguments

    def with_extra(trainer: Any, model: Any, inputs: Any) -> tuple[Any, Any]:
        outputs = model(**inputs)
        return outputs["loss"] + extra(trainer.model, outputs, inputs), outputs

    args = TrainingArguments(
        str(folder), max_steps=STEPS, learning_rate=1e-2, per_device_train_batch_size=4,
        adam_epsilon=1e-3, lr_scheduler_type="constant", report_to="none", save_strategy="no",
        logging_steps=1, disable_tqdm=True, max_grad_norm=0.0, remove_unused_columns=False,
        deepspeed={
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}
        },
    )  # fmt: skip
    return trainer_with_loss(with_extra)(
        Classifier(), args, data_collator=default_collate, train_dataset=data()
    )


def by_hand(extra: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of plain torch, on all of the data in every step."""
    model, found = Classifier(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, eps=1e-3)
    for _ in range(STEPS):
        batch = default_collate(data())
        outputs = model(**batch)
        loss = outputs["loss"] + extra(model, outputs, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, model.state_dict()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize(
    ("extra", "stage"),
    [(l2, 0), (l2, 2), (only_asks, 3), (of_a_module, 3), (gathered, 3)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_loss_may_read_what_is_there(extra: Any, stage: int, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, extra, stage)
    trainer.train()
    wanted, weights = by_hand(l2_without_gradient if extra is gathered else extra)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(wanted, rel=1e-5)
    for name, weight in whole_weights(trainer).items():
        torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=1e-4)
    trainer.close()


def l2_without_gradient(module: Any, outputs: Any, inputs: Any) -> torch.Tensor:
    return l2(module, outputs, inputs).detach()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("extra", [l2, through_data, norms, linear, transposed, fused])
def test_a_loss_that_reads_weights_in_parts_is_told_so(extra: Any, tmp_path: Path) -> None:
    from dstrain.core.errors import TrainingError

    trainer = trainer_of(tmp_path, extra, 3)
    told = r"(?s)computes with first.weight .*partitioned.*weight_decay.*Gathered.*zero_stage to 2"
    with pytest.raises(TrainingError, match=told):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer.close()
