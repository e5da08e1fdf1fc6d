"""The trainer computes what a hand-written loop computes, at every stage and topology."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from tests.models import RaggedTokens, pad_collate, tiny_llama
from tests.parity import reference

STAGES = (0, 1, 2, 3)


def _data(num_samples: int) -> RaggedTokens:
    return RaggedTokens(num_samples)


def _orders(num_samples: int) -> list[list[int]]:
    """Return the trainer's own order of samples; everything after it is written again by hand."""
    from dstrain.data import EpochOrder

    order = EpochOrder(num_samples, seed=42, shuffle=True)
    return [order.indices(epoch).tolist() for epoch in range(reference.EPOCHS)]


@functools.cache
def _torch_losses(num_samples: int) -> tuple[float, ...]:
    losses = reference.plain_torch(tiny_llama(), _data(num_samples), _orders(num_samples))
    return tuple(losses)


def _trainer_losses(
    folder: Path,
    num_samples: int,
    *,
    stage: int,
    world_size: int,
    accumulation: int = 1,
    precision: str = "fp32",
) -> list[float]:
    from dstrain import Trainer, TrainingArguments

    args = TrainingArguments(
        str(folder),
        zero_stage=str(stage),
        bf16=precision == "bf16",
        per_device_train_batch_size=reference.GLOBAL_BATCH // (accumulation * world_size),
        gradient_accumulation_steps=accumulation,
        num_train_epochs=reference.EPOCHS,
        learning_rate=reference.LEARNING_RATE,
        weight_decay=reference.WEIGHT_DECAY,
        max_grad_norm=reference.CLIP,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        tiny_llama(), args, data_collator=pad_collate, train_dataset=_data(num_samples)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.close()
    return losses


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_losses_equal_a_handwritten_deepspeed_loop(
    stage: int, tmp_path: Path, rank: int, world_size: int
) -> None:
    """Catches a wrong weight, a lost or doubled sample, a schedule off by one, wrong clipping."""
    by_hand = reference.plain_deepspeed(
        tiny_llama(),
        _data(32),
        _orders(32),
        stage=stage,
        precision="fp32",
        accumulation=2,
        rank=rank,
        world_size=world_size,
    )
    ours = _trainer_losses(tmp_path, 32, stage=stage, world_size=world_size, accumulation=2)
    assert ours == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_plain_torch_on_one(stage: int, tmp_path: Path, world_size: int) -> None:
    """World size 2 = 1, at each stage, also with a short last global batch (30 = 3 x 8 + 6)."""
    ours = _trainer_losses(tmp_path, 30, stage=stage, world_size=world_size)
    assert ours == pytest.approx(_torch_losses(30), rel=2e-6)


@pytest.mark.ranks(1)
@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_equals_plain_torch(stage: int, tmp_path: Path, world_size: int) -> None:
    """One process through DeepSpeed computes what torch computes."""
    ours = _trainer_losses(tmp_path, 30, stage=stage, world_size=world_size)
    assert ours == pytest.approx(_torch_losses(30), rel=2e-6)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("num_samples", [32, 29])
def test_accumulation_does_not_change_the_curve(
    accumulation: int, num_samples: int, tmp_path: Path, world_size: int
) -> None:
    """4 micro-batches of 1 = 1 of 4, with labels of different lengths and short last windows.

    29 = 3 x 8 + 5 leaves a last micro-step in which one rank has no sample.
    """
    ours = _trainer_losses(
        tmp_path, num_samples, stage=2, world_size=world_size, accumulation=accumulation
    )
    assert ours == pytest.approx(_torch_losses(num_samples), rel=2e-6)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_agree_in_bf16(stage: int, tmp_path: Path, rank: int, world_size: int) -> None:
    """In 16 bits too every stage follows the same curve as stage 0, whose repairs this checks."""
    zero = _trainer_losses(tmp_path, 32, stage=0, world_size=world_size, precision="bf16")
    ours = _trainer_losses(tmp_path, 32, stage=stage, world_size=world_size, precision="bf16")
    assert ours == pytest.approx(zero, rel=2e-4)
    assert sum(ours[4:]) / 4 < sum(ours[:4]) / 4 - 0.1


@pytest.mark.ranks(2)
def test_a_dataset_smaller_than_one_global_batch_trains(tmp_path: Path, world_size: int) -> None:
    """One sample for two ranks: a rank runs a stand-in that must not count."""
    ours = _trainer_losses(tmp_path, 1, stage=3, world_size=world_size)
    assert len(ours) == reference.EPOCHS
    assert ours == pytest.approx(_torch_losses(1), rel=2e-6)


@pytest.mark.ranks(1)
def test_reference_is_sensitive() -> None:
    """The tolerance above would notice an unweighted mean of micro-batches."""
    data = _data(4)
    batches = [pad_collate([data[i]]) for i in range(4)]
    model = tiny_llama()
    with torch.no_grad():
        unweighted = sum(model(**b).loss.item() for b in batches) / 4
        weighted = model(**pad_collate([data[i] for i in range(4)])).loss.item()
    assert unweighted != pytest.approx(weighted, rel=1e-4)
