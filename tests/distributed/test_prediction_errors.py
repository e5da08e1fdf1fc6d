"""Errors in evaluations and predictions: raised on all ranks, and no rank waits for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import TrainerCallback

from tests.distributed.predictions import EVERYTHING_WIDE, Spy
from tests.distributed.runs import make_trainer


@pytest.mark.ranks(2)
def test_errors_of_a_metric_are_raised_on_all_ranks(tmp_path: Path) -> None:
    """Whatever it raises or returns, no rank waits for another; predictions that vary likewise."""
    from dstrain.core.errors import DataError

    trainer = make_trainer(tmp_path)
    trainer.compute_metrics = Spy("metric of rank 0")
    with pytest.raises(RuntimeError, match="metric of rank 0"):
        trainer.evaluate()
    trainer.compute_metrics = lambda prediction: 3
    with pytest.raises(DataError, match="returned int"):
        trainer.evaluate()

    def unpicklable(prediction: Any) -> Any:
        raise type("Local", (Exception,), {})("cannot be sent")

    trainer.compute_metrics = unpicklable
    with pytest.raises(Exception, match="cannot be sent"):
        trainer.evaluate()
    trainer.compute_metrics = Spy()
    step = trainer.prediction_step
    calls: list[int] = []

    def varies(*args: Any, **kwargs: Any) -> Any:
        loss, logits, labels = step(*args, **kwargs)
        calls.append(0)
        other = len(calls) == 2 and trainer.ranks.rank == 1
        return loss, (logits, logits) if other else logits, labels

    trainer.prediction_step = varies
    trainer.args.per_device_eval_batch_size = 1
    with pytest.raises(DataError, match="not nested or formatted"):
        trainer.evaluate()
    calls.clear()

    def breaks(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 3 and trainer.ranks.rank == 1:
            raise MemoryError("rank 1 alone")
        return step(*args, **kwargs)

    trainer.prediction_step = breaks
    for every in (1, 2, 8):
        trainer.args.eval_accumulation_steps = every
        calls.clear()
        with pytest.raises(MemoryError, match="rank 1 alone"):
            trainer.evaluate()
    trainer.prediction_step = step
    assert 0 <= trainer.evaluate()["eval_right"] <= 1


class Breaking(TrainerCallback):
    """Raises on rank 1 after some batch of an evaluation."""

    def __init__(self, rank: int) -> None:
        self.rank, self.seen, self.at = rank, 0, 0

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen += 1
        if self.rank == 1 and self.seen == self.at:
            raise ArithmeticError("callback of rank 1")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_errors_after_a_forward_pass_are_raised_on_all_ranks(
    stage: int, tmp_path: Path, rank: int
) -> None:
    """Also where the others go into forward passes that are collectives before they hear of it."""
    breaking = Breaking(rank)
    trainer = make_trainer(
        tmp_path, stage=stage, deepspeed=EVERYTHING_WIDE if stage == 3 else None,
        per_device_eval_batch_size=1, callbacks=[breaking],
    )  # fmt: skip
    num_batches = 4

    def breaks_at(batch: int) -> Any:
        calls: list[int] = []

        def reduce(logits: Any, labels: Any) -> Any:
            calls.append(0)
            if rank == 1 and len(calls) == batch:
                raise MemoryError("logits of rank 1")
            return logits.argmax(-1)

        return reduce

    trainer.compute_metrics = lambda prediction: {"n": len(prediction.predictions)}
    for every in (1, 3):
        trainer.args.eval_accumulation_steps = every
        for batch in (1, 2, num_batches):
            breaking.at, breaking.seen = batch, 0
            with pytest.raises(ArithmeticError, match="callback of rank 1"):
                trainer.evaluate()
            breaking.at = 0
            trainer.preprocess_logits_for_metrics = breaks_at(batch)
            with pytest.raises(MemoryError, match="logits of rank 1"):
                trainer.evaluate()
            trainer.preprocess_logits_for_metrics = breaks_at(0)
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    trainer.close()


@pytest.mark.ranks(2)
def test_a_full_disk_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    """Rank 0 alone writes; the others must not wait for it."""
    from dstrain.core.errors import TrainingError

    trainer = make_trainer(tmp_path, eval_memory_mb=0, per_device_eval_batch_size=1)
    trainer.compute_metrics = Spy()
    trainer.args.output_dir = str(tmp_path / "not" / "there")
    with pytest.raises(TrainingError, match="cannot be written to disk"):
        trainer.evaluate()
