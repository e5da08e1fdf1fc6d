"""Models built or loaded in `dstrain.partitioned`: files that a save writes, and their layout."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from dstrain.core.ranks import barrier
from tests.distributed.partitioned import (
    MERGED,
    VISION_LANGUAGE,
    assert_partitioned,
    block,
    saved_by_one,
    tiny,
    trained,
)
from tests.distributed.weights import differences, in_files, whole_state


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("name", [*VISION_LANGUAGE, *MERGED])
def test_a_model_that_was_loaded_in_parts_is_saved_as_it_was_stored(
    name: str, tmp_path: Path, rank: int
) -> None:
    """No prefix twice (``model.model.embed_tokens``), no expert transposed or merged."""
    from dstrain.core.ranks import Ranks
    from dstrain.models import HostCopies, save_model, snapshot_weights

    whole = tiny(name)
    stored = in_files(saved_by_one(whole, tmp_path / "stored", rank))
    with block(tmp_path):
        model = type(whole).from_pretrained(tmp_path / "stored")
    assert_partitioned(model)
    ranks = Ranks(rank, rank, 2, 2)
    save_model(model, tmp_path / "saved", ranks)
    held = snapshot_weights(model, ranks, HostCopies(), shard_bytes=20_000)
    assert held is not None
    assert held.shares
    (tmp_path / "held").mkdir(exist_ok=True)
    barrier()
    held.exchanged(None).write(tmp_path / "held", with_index=rank == 0)
    barrier()
    assert differences(stored, in_files(tmp_path / "saved")) == []
    assert differences(stored, in_files(tmp_path / "held")) == []
    index = json.loads((tmp_path / "held/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored)
    assert len(set(index["weight_map"].values())) > 3


@pytest.mark.ranks(2)
def test_only_weights_that_are_merged_are_converted_together(tmp_path: Path, rank: int) -> None:
    """A renamed tensor is gathered alone; of merged experts a group is those of one layer."""
    from dstrain.models import groups_of

    for name in (*VISION_LANGUAGE, "LlamaForCausalLM"):
        saved_by_one(tiny(name), tmp_path / name, rank)
        with block(tmp_path):
            model = type(tiny(name)).from_pretrained(tmp_path / name)
        assert all(group.is_as_trained for group in groups_of(model)), name
    mixtral = tiny("MixtralForCausalLM")
    groups = [group for group in groups_of(mixtral) if not group.is_as_trained]
    layers, experts = mixtral.config.num_hidden_layers, mixtral.config.num_local_experts
    assert [len(group.entries) for group in groups] == [1] * 2 * layers
    assert sorted(len(group.saved) for group in groups) == layers * [experts] + layers * [
        2 * experts
    ]


ALL_IN_BF16 = {"data_types": {"keep_in_fp32_modules": []}}


@pytest.mark.slow
@pytest.mark.ranks(2, timeout=600)
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("name", [VISION_LANGUAGE[0], MERGED[0], MERGED[2], "Glm4MoeForCausalLM"])
def test_checkpoints_and_exports_have_the_layout_of_save_pretrained(
    name: str, stage: int, tmp_path: Path, rank: int
) -> None:
    """A model that was loaded whole, after training: both ways to save, and out of the slices.

    GLM-4's routing has a buffer that stays in fp32, and a weight that transformers would keep so.
    """
    from dstrain.checkpoint.export import export

    saved_by_one(tiny(name), tmp_path / "stored", rank)
    for asynchronous in (False, True):
        model = type(tiny(name)).from_pretrained(tmp_path / "stored")
        whole = copy.deepcopy(model)
        folder = tmp_path / f"run-{asynchronous}"
        trainer = trained(
            folder, model, stage=stage, bf16=True, save_async=asynchronous, deepspeed=ALL_IN_BF16
        )
        checkpoint = folder / "checkpoint-2"
        trainer.save_model()
        state = whole_state(model)
        trainer.close()
        if rank:
            continue
        whole.load_state_dict(state, assign=True)
        whole.tie_weights()
        whole.save_pretrained(tmp_path / "expected")
        expected = in_files(tmp_path / "expected")
        for found in (folder, checkpoint):
            assert differences(expected, in_files(found)) == [], found
        for dtype in (None, "fp32"):
            out = tmp_path / f"exported-{asynchronous}-{dtype}"
            export(checkpoint, out, dtype=dtype)
            exported = in_files(out)
            if dtype:  # more digits, which round to the weights
                rounded = {n: t.to(expected[n].dtype) for n, t in exported.items()}
                assert any(not torch.equal(rounded[n].float(), exported[n]) for n in exported)
                exported = rounded
            assert differences(expected, exported) == [], dtype


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize("stage", [2, 3])
def test_weights_come_back_from_model_files_in_another_layout(
    stage: int, tmp_path: Path, rank: int
) -> None:
    """``load_weights`` of a checkpoint without slices, of a model whose experts are merged."""
    from dstrain.checkpoint import load_weights, read_manifest

    model = tiny("MixtralForCausalLM")
    trainer = trained(tmp_path, model, stage=stage, save_only_model=True)
    trained_to = whole_state(model)
    folder = tmp_path / "kept"
    if rank == 0:
        (tmp_path / "checkpoint-2").rename(folder)
    trainer.args.max_steps = 4
    trainer.train()
    assert differences(trained_to, whole_state(model))
    load_weights(trainer._engines.training, folder, read_manifest(folder), trainer.ranks)
    assert differences(trained_to, whole_state(model)) == []
    trainer.close()
