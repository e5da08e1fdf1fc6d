"""``auto_find_batch_size``: one rank runs out of memory, all go on, nothing is trained twice."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import losses, make_trainer, whole_weights
from tests.models import RaggedTokens, tiny_llama


class _Short:
    """Pretends that a rank has no memory for more than ``limit`` samples, from a step on."""

    def __init__(self, *, limit: int, step: int, where: str) -> None:
        self.limit, self.step, self.where = limit, step, where
        self.trainer: Any = None
        self.failures = 0

    def model(self) -> Any:
        model = tiny_llama()
        model.model.layers[1].mlp.register_forward_hook(self._check)
        return model

    def _check(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        too_large = output.shape[0] > self.limit and module.training
        if not too_large or self.trainer.state.global_step < self.step:
            return
        if self.where == "backward":
            output.register_hook(self._fail)
        else:
            self._fail()

    def _fail(self, *_: Any) -> None:
        self.failures += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Pretended.")


_RUN: dict[str, Any] = {
    "data": RaggedTokens(28), "evaluation": 0, "num_train_epochs": 2, "seed": 3,
    "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2,
}  # fmt: skip


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("stage", "where", "more"),
    [
        (0, "backward", {}),
        (1, "forward", {"bf16": True}),
        (2, "backward", {"lr_scheduler_type": "cosine"}),
        (3, "forward", {}),
        (3, "backward", {"bf16": True}),
    ],
)
def test_all_ranks_go_on_where_one_ran_out_of_memory(
    stage: int, where: str, more: dict[str, Any], rank: int, tmp_path: Path
) -> None:
    """In the middle of an epoch, between the collectives of the others; the curve stays."""
    smaller = {**_RUN, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    plain = make_trainer(tmp_path / "plain", stage=stage, **smaller, **more)
    plain.train()
    expected, weights = losses(plain), whole_weights(plain)
    plain.close()
    short = _Short(limit=2 if rank else 99, step=2, where=where)
    trainer = make_trainer(
        tmp_path / "found",
        stage=stage,
        model=short.model(),
        auto_find_batch_size=True,
        **_RUN,
        **more,
    )
    short.trainer = trainer
    started = time.monotonic()
    trainer.train()
    assert time.monotonic() - started < 30, "nobody waited for a timeout"
    assert short.failures == rank
    assert trainer.state.global_step == len(expected) == 8
    assert trainer.state.train_batch_size == 2
    given = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
    assert given == (4, 1), "arguments are the user's"
    tolerance = 2e-2 if more.get("bf16") else 1e-5
    assert losses(trainer) == pytest.approx(expected, rel=tolerance)
    if not more:
        for name, weight in whole_weights(trainer).items():
            torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-6)
    assert (tmp_path / "found" / "checkpoint-8").is_dir()
    trainer.close()


@pytest.mark.ranks(2)
def test_one_sample_that_does_not_fit_and_other_errors(rank: int, tmp_path: Path) -> None:
    """Halved until one sample is left, then an error; an error of another kind stays one."""
    from dstrain.core.errors import ConfigError, TrainingError

    short = _Short(limit=0 if rank else 99, step=0, where="forward")
    arguments = {**_RUN, "auto_find_batch_size": True, "save_strategy": "no"}
    trainer = make_trainer(tmp_path, stage=2, model=short.model(), **arguments)
    short.trainer = trainer
    with pytest.raises(TrainingError, match="micro-batch of one sample"):
        trainer.train()
    assert short.failures == (3 if rank else 0), "4, 2, 1"
    trainer.close()
    config = {"train_micro_batch_size_per_gpu": 4}
    with pytest.raises(ConfigError, match="needs another value"):
        make_trainer(tmp_path, stage=2, deepspeed=config, **arguments)


@pytest.mark.ranks(1)
def test_a_single_rank_goes_on_too(tmp_path: Path) -> None:
    short = _Short(limit=3, step=1, where="forward")
    arguments = {**_RUN, "auto_find_batch_size": True, "per_device_train_batch_size": 7}
    trainer = make_trainer(tmp_path, stage=2, model=short.model(), **arguments)
    short.trainer = trainer
    trainer.train()
    assert trainer.resolved.micro_batch_size == 1, "the largest that divides 7"
    assert trainer.resolved.accumulation == 7
    assert trainer.state.global_step == 8
    trainer.close()
    short = _Short(limit=3, step=0, where="forward")
    again = make_trainer(tmp_path, stage=2, model=short.model(), **arguments)
    short.trainer = again
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert short.failures == 0, "what was found is kept"
    assert losses(again) == losses(trainer)
    again.close()
