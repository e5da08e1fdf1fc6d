"""A run leaves a model that stops where its tokenizer says, with that tokenizer beside it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.runs import make_trainer
from tests.unit.trainer.test_processing import tokenizer


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_aligns_its_model_and_saves_what_its_collator_has(
    stage: int, tmp_path: Path, rank: int, caplog: Any
) -> None:
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq

    given = tokenizer(eos_token="<|im_end|>", pad_token="<pad>")
    trainer = make_trainer(tmp_path, stage=stage, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.processing_class = given
    with caplog.at_level(logging.WARNING, logger="dstrain"):
        trainer.train()
    said = [r.message for r in caplog.records if "special tokens" in r.message]
    assert len(said) == (0 if rank else 1)
    assert rank or said[0].endswith("eos_token_id=3")
    trainer.processing_class, trainer.data_collator = None, DataCollatorForSeq2Seq(given)
    trainer.save_model(str(tmp_path / "saved"))
    if rank == 0:
        for folder in (tmp_path / "checkpoint-1", tmp_path / "saved"):
            assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 3
            assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
            generation = json.loads((folder / "generation_config.json").read_text())
            assert generation["eos_token_id"] == [3, 2]
    trainer.close()
