"""What is saved of a PEFT model, without ranks: the same as ``peft`` itself saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dstrain.core.adapters import has_adapters, inner_model
from dstrain.core.ranks import Ranks
from dstrain.data import forward_columns, label_columns, returns_loss
from dstrain.data.loss.rule import expected_rule
from dstrain.models import save_model
from tests.models import RegressionModel, tiny_llama

peft = pytest.importorskip("peft")

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "r": 2},
    "dora": {"target_modules": ["q_proj"], "use_dora": True, "r": 2},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "r": 2},
    "bias": {"target_modules": ["q_proj"], "bias": "all", "r": 2},
}


def _same_files(model: Any, folder: Path) -> None:
    save_model(model, folder / "ours", Ranks())
    model.save_pretrained(str(folder / "theirs"))
    for theirs in (folder / "theirs").rglob("adapter_*"):
        ours = folder / "ours" / theirs.relative_to(folder / "theirs")
        if theirs.suffix == ".json":
            assert ours.read_text() == theirs.read_text()
            continue
        here, there = load_file(ours), load_file(theirs)
        assert set(here) == set(there)
        assert here
        assert all(torch.equal(here[name], there[name]) for name in there)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_is_saved_as_peft_saves_it(name: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**CONFIGS[name]))
    _same_files(model, tmp_path)


def test_prompts_and_several_adapters(tmp_path: Path) -> None:
    prompts = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    _same_files(peft.get_peft_model(tiny_llama(), prompts), tmp_path / "prompts")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**CONFIGS["lora"]))
    model.add_adapter("second", peft.LoraConfig(r=1, target_modules=["o_proj"]))
    _same_files(model, tmp_path / "two")
    assert (tmp_path / "two" / "ours" / "second" / "adapter_config.json").exists()


def test_columns_and_targets_are_those_of_the_model_below() -> None:
    plain = tiny_llama()
    adapted = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**CONFIGS["lora"]))
    assert has_adapters(adapted)
    assert not has_adapters(plain)
    assert type(inner_model(adapted)) is type(plain)
    assert forward_columns(adapted) == forward_columns(plain)
    assert label_columns(adapted, None) == label_columns(plain, None) == ["labels"]
    assert expected_rule(adapted, ["labels"]) == expected_rule(plain, ["labels"])
    module = peft.get_peft_model(RegressionModel(), peft.LoraConfig(target_modules=["hidden"]))
    assert forward_columns(module) == ["x", "labels"]


class Contrasts(RegressionModel):
    """Returns a loss without labels, as models do that compare images with texts."""

    def forward(self, x: torch.Tensor, return_loss: bool = True) -> dict[str, torch.Tensor]:
        return {"loss": self.hidden(x).mean()}


def test_a_loss_without_labels_is_that_of_the_model_below() -> None:
    adapted = peft.get_peft_model(Contrasts(), peft.LoraConfig(target_modules=["hidden"]))
    assert returns_loss(Contrasts())
    assert returns_loss(adapted)
    assert not returns_loss(peft.get_peft_model(tiny_llama(), peft.LoraConfig(**CONFIGS["lora"])))
