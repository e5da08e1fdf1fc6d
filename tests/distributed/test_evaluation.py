"""Evaluation: every sample once, every target with the same weight, no rank left waiting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.runs import make_trainer
from tests.models import RaggedTokens, pad_collate, tiny_llama


def _exact(num_samples: int) -> float:
    """Compute the mean loss over all targets, by one forward pass over everything."""
    data = RaggedTokens(num_samples, seed=99)
    with torch.no_grad():
        return tiny_llama()(**pad_collate([data[i] for i in range(num_samples)])).loss.item()


@pytest.mark.parametrize(
    "world_size_wanted", [pytest.param(n, marks=pytest.mark.ranks(n)) for n in (1, 2, 3)]
)
def test_same_loss_at_every_batch_size_and_world_size(
    world_size_wanted: int, tmp_path: Path, world_size: int
) -> None:
    """Catches means of means, doubled and dropped samples; 1 sample is fewer than ranks."""
    assert world_size == world_size_wanted
    for num_samples in (1, 2, 7, 11):
        for batch in (1, 3, 8):
            trainer = make_trainer(
                tmp_path, evaluation=num_samples, per_device_eval_batch_size=batch
            )
            metrics = trainer.evaluate()
            assert metrics["eval_loss"] == pytest.approx(_exact(num_samples), rel=1e-5)
            seen = metrics["eval_samples_per_second"] * metrics["eval_runtime"]
            assert seen == pytest.approx(num_samples, rel=0.05)


@pytest.mark.ranks(3)
def test_unequal_counts_do_not_hang_at_stage_three(tmp_path: Path) -> None:
    """Nothing is kept gathered, so each forward pass is a collective of all ranks."""
    config = {
        "zero_optimization": {
            "stage": 3,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
        }
    }
    for num_samples in (1, 4, 7):
        trainer = make_trainer(
            tmp_path,
            stage=3,
            deepspeed=config,
            evaluation=num_samples,
            per_device_eval_batch_size=2,
            train=5,
            max_steps=2,
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(_exact(num_samples), rel=1e-5)
        trainer.train()
        trainer.evaluate()
        trainer.close()


@pytest.mark.ranks(2)
def test_samples_without_any_target_do_not_poison_the_mean(tmp_path: Path) -> None:
    """A batch whose labels are all ignored has a mean of 0/0, in training as in evaluation."""
    from dstrain import Trainer, TrainingArguments

    data = list(RaggedTokens(8, seed=99))
    for sample in data[:3]:
        sample["labels"] = [-100] * len(sample["labels"])
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        logging_steps=1,
        num_train_epochs=1,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        tiny_llama(), args, data_collator=pad_collate, train_dataset=data, eval_dataset=data
    )
    with torch.no_grad():
        expected = tiny_llama()(**pad_collate(data)).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(e.get("loss", 0.0))) for e in trainer.state.log_history)
    trainer.close()


@pytest.mark.ranks(2)
def test_evaluation_during_training_leaves_the_curve_alone(tmp_path: Path) -> None:
    """Dropout masks and data order are the same with and without evaluations between steps,
    also where a metric draws random numbers.
    """
    curves = []
    for strategy in ("no", "steps"):
        trainer = make_trainer(
            tmp_path,
            model=tiny_llama(attention_dropout=0.3),
            eval_strategy=strategy,
            eval_steps=1,
        )
        trainer.compute_metrics = lambda p: {"noise": float(torch.rand(())) + np.random.rand()}
        trainer.train()
        curves.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
        trainer.close()
    assert curves[0] == curves[1]
