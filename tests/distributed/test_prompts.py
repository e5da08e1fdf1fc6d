"""PEFT methods other than LoRA: saves in the middle are peft's own, and training goes on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.runs import losses, make_trainer, whole_weights
from tests.models import tiny_llama

peft = pytest.importorskip("peft")

_CONFIGS: dict[str, Any] = {
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=16, task_type="CAUSAL_LM"
    ),
    "p-tuning-lstm": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=3,
        encoder_hidden_size=16,
        encoder_reparameterization_type="LSTM",
        encoder_dropout=0.2,
        task_type="CAUSAL_LM",
    ),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix-projected": lambda: peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16, task_type="CAUSAL_LM"
    ),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "lora": lambda: peft.LoraConfig(r=4, task_type="CAUSAL_LM"),
}


def _adapted(kind: str) -> Any:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft: unused arguments of the LSTM
        torch.manual_seed(7)
        return peft.get_peft_model(tiny_llama(), _CONFIGS[kind]())


@pytest.mark.ranks(2)
@pytest.mark.parametrize("kind", _CONFIGS)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_save_in_the_middle_is_pefts_own_and_changes_nothing(
    stage: int, kind: str, rank: int, tmp_path: Path
) -> None:
    """At stage 3 a prompt encoder used to run on rank 0 alone: the next step hung."""
    from safetensors.torch import load_file

    arguments: dict[str, Any] = {
        "stage": stage, "max_steps": 4, "learning_rate": 2e-2, "evaluation": 0,
    }  # fmt: skip
    plain = make_trainer(tmp_path / "plain", model=_adapted(kind), **arguments)
    plain.train()
    trainer = make_trainer(
        tmp_path, model=_adapted(kind), save_strategy="steps", save_steps=1, **arguments
    )
    trainer.train()
    assert losses(trainer) == losses(plain)
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model(str(tmp_path / "saved"))
    whole = _adapted(kind)
    weights = whole_weights(trainer)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.copy_(weights[name])
        # With gradients an LSTM rounds in another way; without noise, as it must be saved.
        whole.eval().save_pretrained(str(tmp_path / f"whole-{rank}"))
    name = "adapter_model.safetensors"
    expected = load_file(tmp_path / f"whole-{rank}" / name)
    for folder in ("saved", "checkpoint-4"):
        found = load_file(tmp_path / folder / name)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), (folder, key)
    before = load_file(tmp_path / "checkpoint-2" / name)
    assert any(not torch.equal(before[key], tensor) for key, tensor in expected.items())
    plain.close()
    trainer.close()
