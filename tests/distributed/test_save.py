"""``save_model``: a complete Hugging Face folder at every stage, equal to the engine's weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.distributed.runs import STAGES, make_trainer, whole_weights
from tests.models import RegressionModel, tiny_llama


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_folder_loads_and_equals_the_engine(
    stage: int, tied: bool, tmp_path: Path, rank: int
) -> None:
    """Weights bit for bit, in the format trained in; tied weights stand once in the file."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    from dstrain.core.errors import ModelError
    from dstrain.core.ranks import barrier
    from dstrain.engine import gathered

    model = tiny_llama(tie_word_embeddings=tied)
    trainer = make_trainer(tmp_path, stage=stage, model=model, bf16=True, max_steps=2)
    trainer.train()
    trainer.save_model()
    expected = whole_weights(trainer)
    if stage == 3:  # the model's own method sees weights only where they are gathered
        with pytest.raises(ModelError, match="save_model.. of the trainer"):
            model.save_pretrained(tmp_path / "own")
        with gathered(model.parameters()):
            if rank == 0:
                model.save_pretrained(tmp_path / "own")
        barrier()
    trainer.close()
    if stage == 3:
        own = AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype="auto")
        assert all(torch.equal(p, expected[name]) for name, p in own.named_parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == set(expected)
    assert ("lm_head.weight" in names) is not tied
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]
    assert (tmp_path / "generation_config.json").exists()


@pytest.mark.ranks(3)
def test_weights_held_for_a_thread_are_those_of_the_moment(tmp_path: Path, rank: int) -> None:
    """Each rank copies its own shares at stage 3; writers get them later, when others are trained.

    Three ranks, whose shares of 259 x 64 elements are padded; a frozen part; small shards.
    """
    from safetensors import safe_open

    from dstrain.core.ranks import barrier
    from dstrain.models import HostCopies, snapshot_weights

    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    trainer = make_trainer(tmp_path / "run", stage=3, model=model, bf16=True, max_steps=2, train=12)
    trainer.train()
    expected = whole_weights(trainer)
    held = snapshot_weights(trainer.model, trainer.ranks, HostCopies(), shard_bytes=50_000)
    assert held is not None
    assert len(held.shares) == len(expected)
    assert not held.whole
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.ds_tensor.fill_(9.0)
    whole = held.exchanged(None)
    (tmp_path / "model").mkdir(exist_ok=True)
    whole.write(tmp_path / "model", with_index=rank == 0)
    barrier()
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(expected)
    assert len(set(index["weight_map"].values())) > 3
    for name, file_name in index["weight_map"].items():
        with safe_open(tmp_path / "model" / file_name, "pt") as file:
            assert torch.equal(file.get_tensor(name), expected[name]), name
    trainer.close()


@pytest.mark.ranks(3)
@pytest.mark.parametrize("stage", [2, 3])
def test_shards_are_written_by_all_ranks_and_old_ones_go(
    stage: int, tmp_path: Path, rank: int
) -> None:
    """The index covers every tensor; a second save with larger shards leaves no stale file."""
    from transformers import AutoModelForCausalLM

    from dstrain.core.ranks import barrier
    from dstrain.models import save_model

    trainer = make_trainer(tmp_path / "run", stage=stage, max_steps=1, train=6)
    trainer.train()
    expected = whole_weights(trainer)
    folder = tmp_path / "model"
    save_model(trainer.model, folder, trainer.ranks, shard_bytes=100_000)
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(files) > 4
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(expected)
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(4 * t.numel() for t in expected.values())
    trainer.close()  # at stage 3 transformers builds models partitioned while the engine lives
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert [n for n, p in loaded.named_parameters() if not torch.equal(p, expected[n])] == []
    barrier()
    save_model(trainer.model, folder, trainer.ranks)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


class WithBuffers(RegressionModel):
    """A plain module with a saved buffer, one that is not saved, and a shared parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("dropped", torch.arange(2.0), persistent=False)
        self.again = nn.ModuleList([self.head])


@pytest.mark.ranks(2)
def test_a_plain_module_is_saved_with_its_buffers(tmp_path: Path) -> None:
    """Persistent buffers are part of the model, a shared parameter stands once."""
    from safetensors.torch import load_file

    from dstrain import Trainer, TrainingArguments

    model = WithBuffers()
    args = TrainingArguments(str(tmp_path), report_to="none", disable_tqdm=True)
    trainer = Trainer(model, args)
    trainer.save_model()
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == {n for n, _ in model.named_parameters()} | {"kept"}
    assert torch.equal(saved["kept"], torch.arange(3.0))


@pytest.mark.ranks(2)
def test_a_failed_write_is_the_same_error_on_all_ranks(tmp_path: Path, rank: int) -> None:
    """One rank's full disk must not leave the others waiting."""
    from dstrain.core.errors import ModelError
    from dstrain.models import save_model

    trainer = make_trainer(tmp_path / "run", stage=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be written"):
        save_model(trainer.model, tmp_path / "file" / "below", trainer.ranks)
    folder = tmp_path / "model"
    # Only the second shard, which rank 1 writes, meets a folder of its own name.
    (folder / "model-00002-of-00002.safetensors" / "x").mkdir(parents=True, exist_ok=True)
    with pytest.raises(ModelError, match="cannot be written"):
        save_model(trainer.model, folder, trainer.ranks, shard_bytes=300_000)
    assert not (folder / "model.safetensors.index.json").exists()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_converted_architecture_is_saved_in_its_own_layout(stage: int, tmp_path: Path) -> None:
    """Mixtral trains with merged experts and is stored with one matrix per expert."""
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    trainer = make_trainer(
        tmp_path, stage=stage, model=MixtralForCausalLM(config), max_steps=1, train=4
    )
    trainer.train()
    trainer.save_model()
    expected = whole_weights(trainer)
    trainer.close()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, expected[n]) for n, p in loaded.named_parameters())
