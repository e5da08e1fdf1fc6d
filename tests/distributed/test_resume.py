"""A resumed run against the one that never stopped: bit for bit where the topology is the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.resumed_runs import (
    EPOCH,
    assert_same,
    check,
    from_rank_zero,
    noisy_llama,
    run,
)
from tests.distributed.runs import STAGES, history, make_trainer, whole_weights
from tests.models import tiny_llama


@pytest.fixture(autouse=True)
def _fp16_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)


FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 3}}
FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "fp16": {"deepspeed": FP16},
}


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_the_run_that_never_stopped(
    stage: int, precision: str, tmp_path: Path, rank: int
) -> None:
    """In the middle of an epoch, with dropout, a schedule and two parameter groups."""
    check(tmp_path, rank, 4, stage=stage, lr_scheduler_type="cosine", **FORMATS[precision])


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_with_the_optimizer_on_the_host(stage: int, tmp_path: Path, rank: int) -> None:
    """DeepSpeed's own CPU Adam keeps its step count elsewhere."""
    check(tmp_path, rank, 4, stage=stage, bf16=True, offload_optimizer="cpu")


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_with_the_optimizer_on_the_host_after_many_steps(
    stage: int, tmp_path: Path, rank: int
) -> None:
    """DeepSpeed's CPU Adam multiplies powers of its betas up, with a rounding error each step.

    The power of 0.999 for step 21 is not the one that ``pow`` gives.
    """
    check(tmp_path, rank, 20, stage=stage, offload_optimizer="cpu", num_train_epochs=5)


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize(
    ("at", "settings"),
    [
        (6, {}),  # at an epoch's end
        (
            6,
            {"logging_strategy": "epoch", "eval_strategy": "epoch"},
        ),  # whose end logs and evaluates
        (4, {"logging_steps": 3}),  # between two logs
        (4, {"eval_strategy": "steps", "eval_steps": 4}),  # after an evaluation
        (2, {"gradient_accumulation_steps": 2}),
        (3, {"gradient_accumulation_steps": 4, "num_train_epochs": 3}),  # short windows
        (4, {"dataloader_num_workers": 1}),
        (4, {"save_async": False}),
    ],
    ids=str,
)
def test_wherever_the_run_stood(
    at: int, settings: dict[str, Any], tmp_path: Path, rank: int
) -> None:
    """Position in the data, meters and what is still to be done at an epoch's end."""
    check(tmp_path, rank, at, stage=2, **settings)


@pytest.mark.ranks(2, timeout=300)
def test_saving_by_epochs(tmp_path: Path, rank: int) -> None:
    """The checkpoint is taken after the epoch's end, so the next epoch begins."""
    check(tmp_path, rank, 6, stage=1, save_strategy="epoch", logging_steps=4)


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("stage", [0, 3])
def test_own_optimizer_and_schedule(stage: int, tmp_path: Path, rank: int) -> None:
    """SGD has no step count and another state; a schedule with a Counter and another without."""
    for make in (
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 5], gamma=0.5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())) if rank == 0 else 0)
        folder = Path(from_rank_zero(str(folder)))

        def trained(at: Path, resume: Any = False, make: Any = make) -> dict[str, Any]:
            model = noisy_llama()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            return run(
                at,
                resume=resume,
                model=lambda: model,
                stage=stage,
                optimizers=(optimizer, make(optimizer)),
                save_strategy="steps",
                save_steps=4,
                **EPOCH,
            )

        whole = trained(folder / "whole")
        if rank == 0:
            shutil.copytree(folder / "whole/checkpoint-4", folder / "again/checkpoint-4")
        from_rank_zero("")
        assert_same(trained(folder / "again", resume=True), whole)


@pytest.mark.ranks(2, timeout=300)
def test_saving_changes_nothing(tmp_path: Path) -> None:
    """A run that saves, in the background or not, is the run that does not."""
    trainer = make_trainer(tmp_path / "none", model=noisy_llama(), stage=3, **EPOCH)
    trainer.train()
    expected = whole_weights(trainer), history(trainer)
    trainer.close()
    for asynchronous in (True, False):
        folder = tmp_path / str(asynchronous)
        settings = {"save_strategy": "steps", "save_steps": 2, "save_async": asynchronous}
        outcome = run(folder, stage=3, **settings, **EPOCH)
        assert outcome["history"] == expected[1]
        for name, weights in expected[0].items():
            assert torch.equal(outcome["weights"][name], weights), name


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {"zero_optimization": {"round_robin_gradients": True}}),
    (3, {"zero_optimization": {"sub_group_size": 20_000}}),
    (1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
    (2, {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}),
]


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize(("stage", "config"), LAYOUTS, ids=str)
def test_other_layouts_of_the_same_stages(
    stage: int, config: dict[str, Any], tmp_path: Path, rank: int
) -> None:
    """Parameters in another order, in several flat tensors, in another wrapper: to and from it."""
    common = {"save_strategy": "steps", "save_steps": 4, "model": tiny_llama, **EPOCH}
    tolerance = 2e-2 if "bf16" in config else 2e-5
    plain = run(tmp_path / "plain", stage=0, **common)
    start = str(tmp_path / "plain/checkpoint-4")
    there = run(tmp_path / "there", resume=start, stage=stage, deepspeed=config, **common)
    assert there["losses"] == pytest.approx(plain["losses"], rel=tolerance)
    start = str(tmp_path / "there/checkpoint-8")
    back = run(tmp_path / "back", resume=start, stage=0, **common)
    assert back["losses"][8:] == pytest.approx(plain["losses"][8:], rel=tolerance)


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_frozen_parameters_and_buffers_come_back(stage: int, tmp_path: Path, rank: int) -> None:
    """Nobody's optimizer has them, and the new run's fresh model has other values in them."""
    from dstrain import Trainer, TrainingArguments
    from tests.models import RegressionModel

    def make(folder: Path, shift: float, at_stage: int) -> Any:
        model = RegressionModel()
        model.register_buffer("seen", torch.zeros(3))
        model.hidden.requires_grad_(False)
        with torch.no_grad():
            model.hidden.weight += shift
            model.seen += shift
        draw = torch.Generator().manual_seed(1)
        rows = torch.randn(16, 8, generator=draw)
        data = [{"x": row, "labels": torch.tensor(1.0)} for row in rows]
        args = TrainingArguments(
            str(folder), max_steps=4, save_steps=2, zero_stage=str(at_stage),
            per_device_train_batch_size=2, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        return Trainer(model, args, train_dataset=data)

    trainer = make(tmp_path, 0.5, stage)
    trainer.train()
    expected = whole_weights(trainer)["hidden.weight"]
    trainer.close()
    for other in (0, 2, 3):
        trainer = make(tmp_path, 0.0, other)
        trainer.train(str(tmp_path / "checkpoint-2"))
        assert torch.equal(whole_weights(trainer)["hidden.weight"], expected), other
        assert torch.equal(trainer.model.seen.cpu(), torch.full((3,), 0.5))
        trainer.close()
