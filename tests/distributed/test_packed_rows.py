"""Sequences in one row: each is trained and evaluated as if it were alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import losses, make_trainer
from tests.distributed.small_models import build_mixing, build_small
from tests.models import RaggedTokens


def _flattened(folder: Path, **arguments: Any) -> Any:
    from transformers import DataCollatorWithFlattening

    trainer = make_trainer(folder, learning_rate=0.0, max_grad_norm=0.0, **arguments)
    trainer.data_collator = DataCollatorWithFlattening()
    return trainer


def _figures(trainer: Any) -> tuple[float, list[float], list[float]]:
    """Return evaluation loss, training losses, gradient norms."""
    evaluation = trainer.evaluate()["eval_loss"]
    trainer.train()
    norms = [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e]
    trainer.close()
    return evaluation, losses(trainer), norms


def _alone(model: Any) -> tuple[float, float, float]:
    """Compute evaluation loss, and a step's loss and norm, by torch, one sequence at a time."""
    from dstrain.data import EpochOrder

    model.config.use_cache = False

    def loss_of(examples: Any) -> torch.Tensor:
        total, targets = torch.zeros(()), 0
        for example in examples:
            ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
            logits = model(input_ids=ids).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(
                logits, labels[0, 1:], reduction="sum"
            )
            targets += int((labels[:, 1:] != -100).sum())
        return total / targets

    with torch.no_grad():
        evaluation = loss_of(RaggedTokens(7, seed=99)).item()
    data = RaggedTokens(8)
    order = EpochOrder(8, seed=42, shuffle=True).indices(0).tolist()
    loss = loss_of([data[i] for i in order])
    loss.backward()
    norm = torch.linalg.vector_norm(
        torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    )
    return evaluation, loss.item(), norm.item()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "gemma3"])
def test_padding_free_batches_are_worth_their_sequences_one_by_one(
    family: str, stage: int, tmp_path: Path
) -> None:
    """With the cache on, transformers does not see that a row holds several sequences."""
    evaluation, loss, norm = _alone(build_small(family))
    for batch in (1, 4):
        model = build_small(family)
        trainer = _flattened(
            tmp_path,
            stage=stage,
            model=model,
            train=8,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            gradient_accumulation_steps=4 // batch,
        )
        found = _figures(trainer)
        assert found[0] == pytest.approx(evaluation, rel=2e-6)
        assert found[1] == [pytest.approx(loss, rel=2e-6)]
        assert found[2] == [pytest.approx(norm, rel=1e-5)]
        assert model.config.use_cache


@pytest.mark.ranks(2)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_packed_conversations_are_worth_each_alone(
    attention: str, stage: int, tmp_path: Path
) -> None:
    """The causal language model task's own packing, several samples in a batch."""
    from dstrain.tasks.causal_lm.chat import collate_conversations, joined, pack
    from dstrain.tasks.causal_lm.trainer import CausalLMTrainer

    found = []
    for example in RaggedTokens(16):
        found.append((example["input_ids"], [-100, *example["labels"][1:]]))
    figures = []
    for packed in (False, True):
        samples: Any = [{"input_ids": ids, "labels": labels} for ids, labels in found]
        if packed:
            samples = [joined(block) for block in pack(found, 40)]
            assert 4 < len(samples) <= 8, "one global batch, of samples with several conversations"
        trainer = make_trainer(
            tmp_path,
            stage=stage,
            cls=CausalLMTrainer,
            model=build_small("llama", attention),
            data=samples,
            evaluation=samples,
            learning_rate=0.0,
            max_grad_norm=0.0,
            per_device_train_batch_size=4 if packed else 8,
            per_device_eval_batch_size=3,
        )
        trainer.data_collator = collate_conversations
        trainer.refuse_mixing()
        figures.append(_figures(trainer))
    (evaluation, (loss,), (norm,)), packed_figures = figures
    assert packed_figures[0] == pytest.approx(evaluation, rel=2e-6)
    assert packed_figures[1] == [pytest.approx(loss, rel=2e-6)]
    assert packed_figures[2] == [pytest.approx(norm, rel=1e-5)]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_models_that_mix_the_sequences_of_a_row_are_found_out(
    stage: int, tmp_path: Path, rank: int, caplog: Any
) -> None:
    """By trying; the arguments of ``forward`` do not tell. Padding-free: a warning."""

    def warnings(model: Any, **arguments: Any) -> list[str]:
        caplog.clear()
        trainer = _flattened(tmp_path, stage=stage, model=model, train=4, **arguments)
        with caplog.at_level(logging.WARNING, logger="dstrain"):
            trainer.train()
        trainer.close()
        return [r.message for r in caplog.records if "see each other" in r.message]

    for family in ("bloom", "mamba", "opt"):
        (message,) = (
            warnings(build_mixing(family)) if rank == 0 else warnings(build_mixing(family)) or [""]
        )
        assert rank or message.startswith(type(build_mixing(family)).__name__)
    for family in ("llama", "gemma3"):
        assert not warnings(build_small(family))
    assert not warnings(build_small("llama"), bf16=True)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_packing_conversations_is_refused_for_a_model_that_mixes_them(
    stage: int, tmp_path: Path
) -> None:
    """Before anything is trained, on all ranks."""
    from dstrain.core.errors import ConfigError
    from dstrain.tasks.causal_lm.chat import collate_conversations
    from dstrain.tasks.causal_lm.trainer import CausalLMTrainer

    trainer = make_trainer(tmp_path, stage=stage, cls=CausalLMTrainer, model=build_mixing("opt"))
    trainer.data_collator = collate_conversations
    with pytest.raises(ConfigError, match="packing=True with OPTForCausalLM"):
        trainer.refuse_mixing()
    trainer.close()
