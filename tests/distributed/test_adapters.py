"""PEFT: adapters on a frozen model train, are saved alone, go on, and merge, at every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.checkpoint.export import export
from dstrain.core.errors import CheckpointError
from tests.distributed.runs import STAGES, losses, make_trainer, whole_weights
from tests.models import RaggedTokens, pad_collate, tiny_llama

peft = pytest.importorskip("peft")


def _adapted(**overrides: Any) -> Any:
    """Make a model with LoRA on two projections and a head trained whole; alike on every rank."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
        **overrides,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return peft.get_peft_model(tiny_llama(), config)


def _logits(model: Any) -> torch.Tensor:
    batch = pad_collate(RaggedTokens(3, seed=5).examples)
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_an_adapter_trains_is_saved_goes_on_and_merges(stage: int, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = {name: p.clone() for name, p in tiny_llama().named_parameters()}
    arguments: dict[str, Any] = {
        "stage": stage, "max_steps": 4, "learning_rate": 2e-2, "save_strategy": "steps",
        "save_steps": 2, "gradient_checkpointing": stage == 3,
    }  # fmt: skip
    trainer = make_trainer(tmp_path, model=_adapted(), **arguments)
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2 + 1
    assert trainer.get_num_trainable_parameters() < 0.3 * sum(p.numel() for p in base.values())
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    expected = trainer.evaluate()["eval_loss"]
    saved = tmp_path / "saved"
    trainer.save_model(str(saved))
    trainer.close()

    assert sorted(p.name for p in saved.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    tensors = load_file(saved / "adapter_model.safetensors")
    assert len(tensors) == len(trained)
    assert all(t.numel() and t.abs().sum() > 0 for t in tensors.values()), "nothing is empty"
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), saved)
    check = make_trainer(tmp_path / "check", model=loaded, stage=0)
    assert check.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    check.close()
    whole = _logits(loaded)
    merged = loaded.merge_and_unload()
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(_logits(merged), whole, rtol=1e-4, atol=1e-5)
    frozen = dict(merged.named_parameters())["model.layers.0.self_attn.k_proj.weight"]
    assert torch.equal(frozen, base["model.layers.0.self_attn.k_proj.weight"])

    folder = tmp_path / "checkpoint-2"
    names = {p.name for p in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names
    with pytest.raises(CheckpointError, match="PEFT model"):
        export(folder, tmp_path / "exported")
    resumed = make_trainer(tmp_path, model=_adapted(), **arguments)
    resumed.train(resume_from_checkpoint=str(folder))
    assert losses(resumed) == losses(trainer)
    resumed.save_model(str(tmp_path / "again"))
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    resumed.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_merging_after_training_adds_what_was_trained(stage: int, tmp_path: Path) -> None:
    """By the trainer at every stage; by peft's own method where ranks hold whole weights."""
    from transformers import AutoModelForCausalLM

    from dstrain.core.errors import ModelError

    trainer = make_trainer(
        tmp_path, model=_adapted(), stage=stage, max_steps=3, learning_rate=2e-2, bf16=stage == 2
    )
    trainer.train()
    expected_loss = trainer.evaluate()["eval_loss"]
    trained = {n.removeprefix("base_model.model."): t for n, t in whole_weights(trainer).items()}
    expected = {n: t for n, t in trained.items() if "lora" not in n and "lm_head" not in n}
    expected["lm_head.weight"] = trained["lm_head.modules_to_save.default.weight"]
    for name in [n for n in expected if ".base_layer." in n]:
        weight = expected.pop(name)
        layer = name.removesuffix(".base_layer.weight")
        a, b = (trained[f"{layer}.lora_{part}.default.weight"] for part in "AB")
        assert b.abs().sum() > 0
        delta = (b.float() @ a.float() * (16 / 4)).to(weight.dtype)
        expected[f"{layer}.weight"] = weight + delta

    if stage == 3:
        for merge in (trainer.model.merge_and_unload, trainer.model.base_model.merge_adapter):
            with pytest.raises(ModelError, match="merge_and_unload.. of the trainer, on all ranks"):
                merge()
        with pytest.raises(ModelError, match="save_model.. of the trainer"):
            trainer.model.save_pretrained(tmp_path / "empty")
        assert not (tmp_path / "empty").exists()
    merged = trainer.model.merge_and_unload() if stage == 1 else trainer.merge_and_unload()
    if stage != 1:
        assert trainer.model is merged
        found = whole_weights(trainer)
        assert set(found) == set(expected)
        for name, weight in expected.items():
            assert torch.equal(found[name], weight), name
        after = trainer.evaluate()["eval_loss"]
        assert after == pytest.approx(expected_loss, rel=2e-2 if stage == 2 else 1e-5)
        trainer.save_model(str(tmp_path / "merged"))
        with pytest.raises(ModelError, match="no PEFT model"):
            trainer.merge_and_unload()
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, weight in merged.named_parameters():
        assert torch.equal(weight, expected[name]), name
    trainer.close()


@pytest.mark.ranks(2)
def test_several_adapters_and_prompts(tmp_path: Path) -> None:
    """An adapter with another name has a folder of its own; prompts are computed when saved."""
    model = _adapted()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["o_proj"]))
    trainer = make_trainer(tmp_path, stage=3, model=model, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "two"))
    trainer.close()
    from safetensors.torch import load_file

    first = load_file(tmp_path / "two" / "adapter_model.safetensors")
    second = load_file(tmp_path / "two" / "second" / "adapter_model.safetensors")
    assert all("o_proj" in name for name in second)
    assert {t.shape for n, t in second.items() if "lora_A" in n} == {(2, 64)}
    assert not set(first) & set(second)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        prompted = peft.get_peft_model(tiny_llama(), config)
    trainer = make_trainer(tmp_path, stage=3, model=prompted, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "prompt"))
    trainer.close()
    saved = load_file(tmp_path / "prompt" / "adapter_model.safetensors")
    assert saved["prompt_embeddings"].shape == (3, 64)
    assert saved["prompt_embeddings"].abs().sum() > 0
