"""``zero_stage="auto"`` on real ranks: the same on all, explained, final before the model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dstrain.config import Machine
from dstrain.config.difference import RECORD_FILE, read_record
from dstrain.config.memory.footprint import CPU_OVERHEAD_BYTES
from tests.distributed.runs import losses, make_trainer
from tests.models import RaggedTokens, pad_collate, tiny_llama_config

# Small enough for stage 3 to save something on a model of 115 thousand parameters.
SMALL = {
    "zero_optimization": {
        "reduce_bucket_size": 20_000,
        "stage3_prefetch_bucket_size": 20_000,
        "stage3_param_persistence_threshold": 1000,
        "stage3_max_live_parameters": 20_000,
        "stage3_max_reuse_distance": 0,
        "sub_group_size": 10_000,
    }
}


def provenance(trainer: Any) -> str:
    return trainer.resolved.provenance["zero_optimization.stage"].detail


@pytest.mark.ranks(2)
def test_what_a_first_run_on_the_cpu_gets(tmp_path: Path, caplog: Any) -> None:
    """A small model with plenty of memory: stage 1, with the reason in the run's record."""
    trainer = make_trainer(tmp_path, stage="auto", max_steps=1)
    assert trainer.resolved.stage == 1
    assert "stage 1 fits" in provenance(trainer)
    assert "GiB per rank" in provenance(trainer)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="dstrain"):
        trainer.train()
    logged = [r.getMessage() for r in caplog.records if RECORD_FILE in r.getMessage()]
    assert len(logged) == (1 if trainer.ranks.is_main else 0)
    if logged:
        assert "stage 1 fits" in logged[0]
        assert "gradient_clipping" in logged[0]
    record = read_record(str(tmp_path))
    assert record is not None
    assert record["deepspeed"]["zero_optimization"]["stage"] == 1
    assert record["provenance"]["zero_optimization.stage"]["detail"] == provenance(trainer)
    assert record["facts"]["world_size"] == 2
    assert record["facts"]["model"]["num_parameters"] == 115_392
    assert record["facts"]["num_training_steps"] == 1
    assert record["arguments"]["max_steps"] == 1
    assert record["versions"]["torch"]
    trainer.close()


@pytest.mark.ranks(2)
def test_the_record_of_a_run_compares_with_its_own_flags(tmp_path: Path, capsys: Any) -> None:
    """What was written at train start is what ``explain --diff`` reads."""
    from dstrain.cli import explain

    trainer = make_trainer(tmp_path, stage=2, max_steps=1)
    trainer.train()
    trainer.close()
    shape = "hidden_size=64,intermediate_size=128,num_hidden_layers=2,vocab_size=259"
    heads = "num_attention_heads=4,num_key_value_heads=4"
    words = (
        *("--zero_stage", "2", "--per_device_train_batch_size", "2", "--learning_rate", "1e-3"),
        *("--num_train_epochs", "1", "--max_steps", "1", "--logging_steps", "1"),
        *("--report_to", "none", "--disable_tqdm", "true", "--world_size", "2"),
        *("--save_strategy", "no"),
        *("--device", "cpu", "--model_config", f"llama:{shape},{heads}", "--diff", str(tmp_path)),
    )
    assert explain.run(words) == 0, capsys.readouterr().out
    assert explain.run([*words, "--max_grad_norm", "0.5"]) == 1
    assert "gradient_clipping" in capsys.readouterr().out


@pytest.mark.ranks(2)
def test_the_rank_with_the_least_memory_decides_and_a_second_training_keeps_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """No machine is as small as this one, so its size is stated; everything else is real."""
    from dstrain.trainer import build

    kept_free = 0.7
    needs_stage_3 = int((1.75e6 + CPU_OVERHEAD_BYTES) / kept_free)
    memory = needs_stage_3 if rank == 1 else 100 * needs_stage_3
    monkeypatch.setattr(build, "read_machine", lambda *_, **__: Machine(2, memory, memory))
    trainer = make_trainer(tmp_path, stage="auto", deepspeed=SMALL, max_steps=3)
    assert trainer.resolved.stage == 3
    assert "stage 1 lacks" in provenance(trainer)
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.train()
    assert trainer.resolved.stage == 3
    monkeypatch.undo()  # memory for any stage, but now the model is partitioned
    trainer.train()
    assert trainer.resolved.stage == 3
    assert "partitioned already" in provenance(trainer)
    assert trainer.evaluate()["eval_loss"] > 0
    found = losses(trainer)
    assert len(found) == 6
    assert found[3] < found[0]  # the same samples again, with what was learnt
    trainer.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", ["auto", "3"])
def test_the_config_is_final_before_the_model_is_built(stage: str, tmp_path: Path) -> None:
    """Built for one persistence threshold and trained with another, parameters would be kept
    whole by one and partitioned by the other."""
    from dstrain import TrainingArguments
    from dstrain.models import build_causal_lm, count_causal_lm
    from dstrain.tasks.causal_lm.trainer import CausalLMTrainer
    from dstrain.trainer.build import resolve_config, start_run

    config = tiny_llama_config()
    args = TrainingArguments(
        str(tmp_path), zero_stage=stage, max_steps=1, report_to="none", disable_tqdm=True
    )
    ranks = start_run(args)
    before = resolve_config(args, ranks, sizes=count_causal_lm(config), sequence_length=24)
    assert "zero_optimization.reduce_bucket_size" in before.values
    model = build_causal_lm(config, before)
    trainer = CausalLMTrainer(
        model,
        args,
        data_collator=pad_collate,
        train_dataset=RaggedTokens(8),
        sequence_length=24,
    )
    assert dict(trainer.resolved.values) == dict(before.values)
    assert trainer.resolved.provenance == before.provenance
    trainer.train()
    saved = json.loads((tmp_path / RECORD_FILE).read_text())
    assert saved["deepspeed"]["zero_optimization"] == before.to_deepspeed()["zero_optimization"]
    trainer.close()
