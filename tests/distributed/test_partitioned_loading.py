"""`from_pretrained` in `dstrain.partitioned`, against loading whole."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.core.ranks import barrier
from tests.distributed.partitioned import assert_partitioned, block, saved_by_one, tiny
from tests.distributed.weights import differences, in_files, whole_state


def base_into_head(folder: Path, rank: int) -> tuple[Any, Path]:
    from transformers import BertForSequenceClassification, BertModel

    base = tiny("BertForSequenceClassification").bert
    assert isinstance(base, BertModel)
    return BertForSequenceClassification, saved_by_one(base, folder, rank)


def head_into_base(folder: Path, rank: int) -> tuple[Any, Path]:
    from transformers import BertModel

    return BertModel, saved_by_one(tiny("BertForSequenceClassification"), folder, rank)


def in_shards(folder: Path, rank: int) -> tuple[Any, Path]:
    model = tiny("MixtralForCausalLM")
    if rank == 0:
        model.save_pretrained(folder, max_shard_size=30_000)
        assert len(list(folder.glob("*.safetensors"))) > 3
    barrier()
    return type(model), folder


def pickled(folder: Path, rank: int) -> tuple[Any, Path]:
    """Save with both names of a tied weight, as torch's own files have them."""
    model = tiny("LlamaForCausalLM", tie_word_embeddings=True)
    saved_by_one(model, folder, rank)
    if rank == 0:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    barrier()
    return type(model), folder


def tied_in_config_alone(folder: Path, rank: int) -> tuple[Any, Path]:
    """Save two values under names that the config ties; transformers keeps both."""
    model = tiny("LlamaForCausalLM", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[-1] += 1.0  # in the share of the last rank alone
    model.config.tie_word_embeddings = True
    return type(model), saved_by_one(model, folder, rank)


def with_buffers(folder: Path, rank: int) -> tuple[Any, Path]:
    model = tiny("ResNetForImageClassification")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
    return type(model), saved_by_one(model, folder, rank)


def with_older_names(folder: Path, rank: int) -> tuple[Any, Path]:
    """Save under ``gamma`` and ``beta``, which a conversion of all models renames."""
    from safetensors.torch import save_file

    model = tiny("BertForSequenceClassification")
    saved_by_one(model, folder, rank)
    if rank == 0:
        new = in_files(folder)
        renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        older = {}
        for name, tensor in new.items():
            end = ".".join(name.split(".")[-2:])
            older[name.replace(end, renamed.get(end, end))] = tensor
        save_file(older, folder / "model.safetensors", {"format": "pt"})
    barrier()
    return type(model), folder


SOURCES = [
    base_into_head, head_into_base, in_shards, pickled, tied_in_config_alone, with_buffers,
    with_older_names,
]  # fmt: skip


@pytest.mark.ranks(2)
@pytest.mark.parametrize("source", SOURCES)
def test_loading_in_parts_gives_what_loading_whole_gives(
    source: Callable[[Path, int], tuple[Any, Path]], tmp_path: Path, rank: int
) -> None:
    """Weights, buffers, the report of what was missing, and what is saved afterwards."""
    from dstrain.core.ranks import Ranks
    from dstrain.models import save_model

    cls, folder = source(tmp_path / "stored", rank)
    with block(tmp_path):
        pass  # it seeds nothing and changes nothing outside
    torch.manual_seed(3)
    whole, told_whole = cls.from_pretrained(folder, output_loading_info=True)
    torch.manual_seed(3 + rank)  # the main rank's random values count
    with block(tmp_path):
        model, told = cls.from_pretrained(folder, output_loading_info=True)
    assert_partitioned(model)
    assert differences(whole.state_dict(), whole_state(model)) == []
    assert differences(dict(whole.named_buffers()), dict(model.named_buffers())) == []
    assert told == told_whole
    for name, parameter in whole.named_parameters(remove_duplicate=False):
        assert model.get_parameter(name).requires_grad == parameter.requires_grad
    ties = [len(list(m.parameters())) for m in (whole, model)]
    assert ties[0] == ties[1]
    expected = in_files(saved_by_one(whole, tmp_path / "whole", rank))
    save_model(model, tmp_path / "saved", Ranks(rank, rank, 2, 2))
    assert differences(expected, in_files(tmp_path / "saved")) == []


@pytest.mark.ranks(2)
def test_parameters_have_the_format_of_training_and_buffers_their_own(
    tmp_path: Path, rank: int
) -> None:
    """As the engine makes it of a whole model: bf16 weights, fp32 statistics."""
    for name in ("ResNetForImageClassification", "MixtralForCausalLM"):
        model = tiny(name)
        saved_by_one(model, tmp_path / name, rank)
        with block(tmp_path, bf16=True):
            loaded = type(model).from_pretrained(tmp_path / name)
            built = type(model)._from_config(copy.deepcopy(model.config))
        for made in (loaded, built):
            assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
            formats = [{n: b.dtype for n, b in m.named_buffers()} for m in (model, made)]
            assert formats[0] == formats[1]
        expected = {n: p.to(torch.bfloat16) for n, p in model.named_parameters()}
        state = whole_state(loaded)
        assert differences(expected, {n: state[n] for n in expected}) == []


@pytest.mark.ranks(2)
def test_a_rank_holds_its_share_of_what_it_loads(tmp_path: Path, rank: int) -> None:
    """Memory that is a process's own grows by the partition, and one tensor or a little more."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def own_memory() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    config = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=4096, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    if rank == 0:
        whole = LlamaForCausalLM(config)
        size = sum(p.nbytes for p in whole.parameters())
        whole.save_pretrained(tmp_path / "stored")
        del whole
    else:
        size = 0
    from dstrain.core.ranks import gather_objects

    size = gather_objects(size)[0]
    with block(tmp_path):
        before = own_memory()
        model = LlamaForCausalLM.from_pretrained(tmp_path / "stored")
        grown = own_memory() - before
    assert_partitioned(model)
    assert size > 150e6
    assert grown < 0.65 * size, (grown, size)


@pytest.mark.ranks(2)
def test_a_checkpoint_that_one_rank_cannot_read_stops_all(tmp_path: Path, rank: int) -> None:
    """The others would wait for it otherwise; and afterwards loading works again."""
    from dstrain.core.errors import ModelError

    model = tiny("LlamaForCausalLM")
    saved_by_one(model, tmp_path / "0", rank)
    if rank == 1:
        shutil.copytree(tmp_path / "0", tmp_path / "1")
        path = tmp_path / "1/model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
    expected = "rank 1" if rank == 0 else "incomplete|size"
    with block(tmp_path):
        with pytest.raises(Exception, match=expected) as caught:
            type(model).from_pretrained(tmp_path / str(rank))
        assert isinstance(caught.value, ModelError) is (rank == 0)
        assert_partitioned(type(model).from_pretrained(tmp_path / "0"))


@pytest.mark.ranks(2)
def test_a_device_map_is_refused(tmp_path: Path, rank: int) -> None:
    from dstrain.core.errors import ModelError

    model = tiny("LlamaForCausalLM")
    saved_by_one(model, tmp_path / "stored", rank)
    with block(tmp_path), pytest.raises(ModelError, match="leave device_map out"):
        type(model).from_pretrained(tmp_path / "stored", device_map="cpu")


@pytest.mark.ranks(2)
def test_misfitting_weights_are_made_anew_where_that_is_asked_for(
    tmp_path: Path, rank: int
) -> None:
    """As whole loading does it: the head anew, the rest exact; else an error on all ranks."""
    whole = tiny("BertForSequenceClassification")
    cls = type(whole)
    saved_by_one(whole, tmp_path / "stored", rank)
    torch.manual_seed(7)
    expected = cls.from_pretrained(
        tmp_path / "stored", num_labels=5, ignore_mismatched_sizes=True
    ).state_dict()
    torch.manual_seed(7 + rank)
    with block(tmp_path):
        model = cls.from_pretrained(tmp_path / "stored", num_labels=5, ignore_mismatched_sizes=True)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            cls.from_pretrained(tmp_path / "stored", num_labels=5)
    assert_partitioned(model)
    assert tuple(expected["classifier.weight"].shape)[0] == 5
    assert differences(expected, whole_state(model)) == []
