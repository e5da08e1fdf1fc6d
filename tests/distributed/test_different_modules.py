"""Ranks that run different modules, at stage 3 and with LayerDrop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.distributed.routed import Routed, RoutedByRank, steps, trainer_of


@pytest.mark.ranks(2)
def test_ranks_that_run_different_modules_are_told_in_the_first_step(
    tmp_path: Path, rank: int
) -> None:
    """Both, naming the modules, before weights of one are taken for those of the other."""
    from dstrain.core.errors import ModelError

    # 4 runs block 0, 2 block 2: of one size, which would be gathered without a word.
    trainer = trainer_of(tmp_path, RoutedByRank((4, 2)), zero_stage="3", max_steps=2)
    with pytest.raises(ModelError) as told:
        trainer.train()
    assert "rank 0 came to block.0 (Sequential), rank 1 to block.2 (Sequential)" in str(told.value)
    assert "leaf_modules" in str(told.value)
    assert "zero_stage=2" in str(told.value)
    trainer.close()
    # 3 runs no block; the ranks then come to a head and to a block.
    trainer = trainer_of(tmp_path, RoutedByRank((3, 2)), zero_stage="3", max_steps=2)
    with pytest.raises(ModelError, match=r"head.1 \(Linear\), rank 1 to block.2"):
        trainer.train()
    trainer.close()


class TwoResults(Routed):
    """All modules run on all ranks; the loss of each leaves one of the heads out."""

    def forward(self, x: torch.Tensor, route: torch.Tensor, labels: torch.Tensor) -> Any:
        import torch.distributed as dist

        hidden = torch.tanh(self.body(x))
        results = [head(hidden).squeeze(-1) for head in self.head]
        return {"loss": functional.mse_loss(results[dist.get_rank()], labels)}


@pytest.mark.ranks(2)
def test_a_result_that_one_rank_does_not_use_is_told_in_the_first_step(tmp_path: Path) -> None:
    from dstrain.core.errors import ModelError

    trainer = trainer_of(tmp_path, TwoResults(), zero_stage="3", max_steps=2)
    with pytest.raises(ModelError, match=r"rank 0 came to head.0 \(Linear\), rank 1 to head.1"):
        trainer.train()
    trainer.close()


@pytest.mark.ranks(2)
def test_an_order_that_changes_on_all_ranks_alike_trains_on(tmp_path: Path) -> None:
    routes = [(n, n) for n in (0, 0, 0, 1, 1, 1, 5, 0, 3, 3, 3, 0)]
    trainer = trainer_of(tmp_path, RoutedByRank(*routes), zero_stage="3")
    trainer.train()
    found = steps(trainer)
    trainer.close()
    whole = trainer_of(tmp_path, RoutedByRank(*routes), zero_stage="0")
    whole.train()
    assert found == [pytest.approx(step, rel=1e-4) for step in steps(whole)]
    whole.close()
    assert len(found) == 12


def test_a_rank_that_leaves_the_recorded_order_later_is_told(tmp_path: Path) -> None:
    """After steps that were alike; the rank that waits for it says the same."""
    from tests.distributed.forked import run_job

    for said in run_job("part", tmp_path, timeout=100)["said"]:
        assert "3 steps, then: rank 1 came to block.2 (Sequential), and other ranks did" in said
        assert "leaf_modules" in said


def layer_dropping_bart(**settings: float) -> nn.Module:
    from transformers import BartConfig, BartForSequenceClassification

    torch.manual_seed(0)
    return BartForSequenceClassification(
        BartConfig(
            vocab_size=32, d_model=16, encoder_layers=3, decoder_layers=3, encoder_ffn_dim=16,
            decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
            max_position_embeddings=16, dropout=0.0, num_labels=2, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, **settings,
        )
    )  # fmt: skip


def drop_layers(folder: Path, stage: int) -> list[tuple[float, float]]:
    from dstrain import Trainer, TrainingArguments

    rows = [{"input_ids": [3 + n, 5, 7 + n, 2], "labels": n % 2} for n in range(16)]
    args = TrainingArguments(
        str(folder), zero_stage=str(stage), per_device_train_batch_size=1, max_steps=6,
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_accumulation_steps=2, learning_rate=1e-2,
    )  # fmt: skip
    model = layer_dropping_bart(encoder_layerdrop=0.5, decoder_layerdrop=0.5)
    trainer = Trainer(model, args, train_dataset=rows)
    try:
        trainer.train()
    finally:
        trainer.close()
    return steps(trainer)


@pytest.mark.ranks(2)
def test_layerdrop_trains_below_stage_3_and_is_refused_there(tmp_path: Path) -> None:
    """Ranks skip different layers; all stages draw alike."""
    from dstrain.core.errors import ModelError

    whole = drop_layers(tmp_path, 0)
    for stage in (1, 2):
        assert drop_layers(tmp_path, stage) == [pytest.approx(s, rel=1e-4) for s in whole]
    with pytest.raises(ModelError) as told:
        drop_layers(tmp_path, 3)
    assert "set config.encoder_layerdrop=0.0" in str(told.value)
    assert "set config.decoder_layerdrop=0.0" in str(told.value)
