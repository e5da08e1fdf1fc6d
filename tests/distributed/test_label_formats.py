"""Float labels in a 16-bit run are those of the data, in training and in evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.runs import losses, make_trainer

LABELS = [1004665.0, 1000001.0, 999999.0, 1234567.0]  # none of them is a number of bf16


class Distance(nn.Module):
    """Predicts nothing much; its loss is the mean distance of the labels from that."""

    def __init__(self, loss: Any = None) -> None:
        super().__init__()
        self.head = nn.Linear(4, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.loss = nn.L1Loss() if loss is None else loss

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        prediction = self.head(x).squeeze(-1)
        assert prediction.dtype == torch.bfloat16
        return self.loss(prediction, labels), prediction


def _collate(samples: Any) -> dict[str, torch.Tensor]:
    return {
        "x": torch.ones(len(samples), 4),
        "labels": torch.tensor(samples),
    }


def _trainer(folder: Path, model: nn.Module, **arguments: Any) -> Any:
    trainer = make_trainer(
        folder, model=model, data=LABELS, evaluation=LABELS, bf16=True, max_steps=1, **arguments
    )
    trainer.data_collator = _collate
    return trainer


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_labels_are_not_rounded_to_the_format_of_the_model(stage: int, tmp_path: Path) -> None:
    """Also by losses that cannot compute in two formats, and in every release of torch."""
    mean = sum(LABELS) / len(LABELS)
    square = sum(label**2 for label in LABELS) / len(LABELS)
    for loss, right in ((None, mean), (nn.MSELoss(), square), (nn.HuberLoss(), mean - 0.5)):
        trainer = _trainer(tmp_path, Distance(loss), stage=stage, learning_rate=0.0)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(right, rel=1e-7)
        trainer.train()
        assert losses(trainer) == [pytest.approx(right, rel=1e-7)]
        assert trainer.evaluate()["eval_loss"] == pytest.approx(right, rel=1e-7)
        trainer.close()


@pytest.mark.ranks(1)
def test_an_evaluation_in_16_bits_of_a_run_in_fp32_has_its_labels(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, Distance(), stage=2)
    trainer.args.bf16, trainer.args.bf16_full_eval = False, True
    trainer.propagate_args_to_deepspeed()
    right = sum(LABELS) / len(LABELS)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(right, rel=1e-7)
    trainer.close()


@pytest.mark.ranks(1)
def test_a_compiled_model_computes_its_loss_with_the_labels_of_the_data(tmp_path: Path) -> None:
    trainer = _trainer(
        tmp_path,
        Distance(nn.MSELoss()),
        stage=1,
        torch_compile_backend="aot_eager",
        per_device_train_batch_size=4,
    )
    trainer.train()
    square = sum(label**2 for label in LABELS) / len(LABELS)
    assert losses(trainer) == [pytest.approx(square, rel=1e-7)]
    trainer.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "problem", ["regression", "multi_label_classification", "single_label_classification"]
)
def test_a_classifier_has_the_loss_of_plain_torch(problem: str, stage: int, tmp_path: Path) -> None:
    """Every loss of transformers' sequence classification, with float labels where it takes any."""
    from transformers import BertConfig, BertForSequenceClassification

    def build() -> Any:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=1 if problem == "regression" else 3,
            problem_type=problem,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return BertForSequenceClassification(config)

    draw = torch.Generator().manual_seed(1)
    labels: dict[str, Any] = {
        "regression": lambda: 300 + 77 * torch.rand((), generator=draw),
        "multi_label_classification": lambda: 0.3 * torch.rand(3, generator=draw),
        "single_label_classification": lambda: torch.randint(3, (), generator=draw),
    }
    samples = [
        {"input_ids": torch.randint(3, 60, (5,), generator=draw), "labels": labels[problem]()}
        for _ in range(8)
    ]

    def collate(given: Any) -> dict[str, torch.Tensor]:
        return {name: torch.stack([s[name] for s in given]) for name in given[0]}

    model = build().to(torch.bfloat16).eval()
    batch = collate(samples)
    logits = model(input_ids=batch["input_ids"]).logits.float()
    right = {
        "regression": lambda: nn.functional.mse_loss(logits.squeeze(-1), batch["labels"]),
        "multi_label_classification": lambda: nn.functional.binary_cross_entropy_with_logits(
            logits, batch["labels"]
        ),
        "single_label_classification": lambda: nn.functional.cross_entropy(logits, batch["labels"]),
    }[problem]().item()
    trainer = make_trainer(
        tmp_path,
        stage=stage,
        model=build(),
        data=samples,
        evaluation=samples,
        bf16=True,
        max_steps=1,
        gradient_accumulation_steps=2,
        learning_rate=0.0,
    )
    trainer.data_collator = collate
    trainer.train()
    # Classes of integers are compared by torch in the model's own 16 bits.
    tolerance = 4e-3 if problem == "single_label_classification" else 3e-5
    assert losses(trainer) == [pytest.approx(right, rel=tolerance)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(right, rel=tolerance)
    trainer.close()
