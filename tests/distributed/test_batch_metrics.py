"""Metrics that are computed batch by batch (`batch_eval_metrics`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.predictions import Spy, Stream, check_predictions
from tests.distributed.runs import make_trainer
from tests.models import RaggedTokens, tiny_llama


class BatchedAccuracy:
    """Counts right tokens batch by batch."""

    def __init__(self, fails_at: int = -1) -> None:
        self.right = self.all = self.calls = 0
        self.fails_at = fails_at

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float]:
        assert isinstance(prediction.predictions, torch.Tensor)
        if self.calls == self.fails_at:
            raise ArithmeticError("batch metric")
        self.calls += 1
        labels = prediction.label_ids[:, 1:]
        real = labels != -100
        right = (prediction.predictions.argmax(-1)[:, :-1] == labels) & real
        self.right += int(right.sum())
        self.all += int(real.sum())
        if not compute_result:
            return {}
        return {"right": self.right / self.all, "targets": self.all, "calls": self.calls}


@pytest.mark.parametrize(
    "world_size_wanted", [pytest.param(n, marks=pytest.mark.ranks(n)) for n in (2, 3)]
)
def test_batch_metrics_keep_nothing_and_are_exact(
    world_size_wanted: int, tmp_path: Path, rank: int
) -> None:
    """Same figure as from all predictions; the last call is told so, for streams as well."""
    for num_samples in (1, 7):
        data = list(RaggedTokens(num_samples, seed=99))
        whole = make_trainer(tmp_path, evaluation=data)
        whole.compute_metrics = Spy()
        expected = whole.evaluate()["eval_right"]
        for dataset in (data, Stream(data)):
            trainer = make_trainer(
                tmp_path,
                evaluation=dataset,
                per_device_eval_batch_size=2,
                batch_eval_metrics=True,
                eval_accumulation_steps=2,
            )
            trainer.compute_metrics = metric = BatchedAccuracy()
            found = trainer.evaluate()
            assert found["eval_right"] == pytest.approx(expected, abs=1e-12)
            assert found["eval_targets"] == sum(
                sum(x != -100 for x in s["labels"][1:]) for s in data
            )
            assert found["eval_calls"] == -(-num_samples // (2 * trainer.ranks.world_size))
            assert metric.calls == (found["eval_calls"] if rank == 0 else 0)
            trainer.compute_metrics = BatchedAccuracy()
            output = trainer.predict(dataset)  # which must return them all the same
            assert output.metrics["test_right"] == found["eval_right"]
            if rank == 0:
                check_predictions(output.predictions, output.label_ids, num_samples)
            trainer.compute_metrics = BatchedAccuracy(fails_at=0)
            with pytest.raises(ArithmeticError, match="batch metric"):
                trainer.evaluate()


@pytest.mark.ranks(2)
def test_batch_metrics_need_their_argument(tmp_path: Path) -> None:
    """Found when the trainer is built, not after a training."""
    from dstrain import Trainer, TrainingArguments

    args = TrainingArguments(str(tmp_path), batch_eval_metrics=True, report_to="none")
    with pytest.raises(ValueError, match="compute_result"):
        Trainer(tiny_llama(), args, compute_metrics=Spy())
