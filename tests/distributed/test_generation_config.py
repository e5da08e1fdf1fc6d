"""A generation config that the first save would fail of is found before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.runs import make_trainer
from tests.models import tiny_llama


def published(folder: Path) -> Any:
    """Make a model whose published generation config is one that transformers would not write."""
    from transformers import LlamaForCausalLM

    tiny_llama().save_pretrained(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2})
    )
    return LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.ranks(1)
def test_what_cannot_be_saved_is_refused_with_its_fields(tmp_path: Path) -> None:
    """When the Trainer is made, and when training starts."""
    from dstrain.core.errors import ConfigError

    model = tiny_llama()
    model.generation_config.temperature, model.generation_config.top_k = 0.6, 20
    with pytest.raises(ConfigError) as caught:
        make_trainer(tmp_path, model=model)
    assert "`temperature`" in str(caught.value)
    assert "`top_k`" in str(caught.value)
    assert "do_sample=True" in str(caught.value)
    model.generation_config.do_sample = True
    trainer = make_trainer(tmp_path, model=model, train=4, evaluation=0)
    model.generation_config.do_sample = False
    with pytest.raises(ConfigError, match="contradicts itself"):
        trainer.train()
    model.generation_config.do_sample = True
    trainer.train()
    trainer.save_model()
    trainer.close()


@pytest.mark.ranks(1)
def test_what_was_published_like_this_is_saved_like_this(tmp_path: Path) -> None:
    """As transformers does; also where a change of our own has come to it."""
    from dstrain.trainer.generation_config import changing, why_not_saved

    model = published(tmp_path / "hub")
    trainer = make_trainer(
        tmp_path / "run", model=model, train=4, evaluation=0, save_strategy="epoch"
    )
    trainer.train()
    with changing(model.generation_config):
        model.generation_config.pad_token_id = 0
    trainer.save_model()
    saved = json.loads((tmp_path / "run/generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"], saved["pad_token_id"]) == (0.6, 0.9, 0)
    model.generation_config.pad_token_id = 1  # the user's own change
    assert why_not_saved(model.generation_config) is not None
    with pytest.raises(ValueError, match="temperature"):
        model.generation_config.save_pretrained(tmp_path)
    trainer.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("background", [False, True])
def test_a_save_that_a_callback_has_spoilt_fails_on_all_ranks(
    background: bool, tmp_path: Path
) -> None:
    """None waits for the others."""
    from transformers import TrainerCallback

    from dstrain.core.errors import CheckpointError

    class Spoil(TrainerCallback):
        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            model.generation_config.temperature = 0.6

    trainer = make_trainer(
        tmp_path, train=4, evaluation=0, save_strategy="epoch", save_async=background,
        callbacks=[Spoil()],
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="temperature"):
        trainer.train()
