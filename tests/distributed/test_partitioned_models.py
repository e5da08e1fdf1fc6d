"""Models built in `dstrain.partitioned`: constructors that use weights, and other vocabularies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.partitioned import (
    VISION_LANGUAGE,
    assert_partitioned,
    block,
    saved_by_one,
    tiny,
    trained,
)
from tests.distributed.runs import make_trainer
from tests.distributed.weights import differences, in_files, whole_state


def detr_config() -> Any:
    """Make the config of a model whose constructor copies the weights of a BatchNorm."""
    import transformers

    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "out_features": ["stage2"]}
    backbone = transformers.ResNetConfig(embedding_size=8, layer_type="basic", **sizes)
    parts = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    wide = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 16)
    return transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, num_queries=4,
        num_labels=3, **parts, **heads, **wide,
    )  # fmt: skip


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("way", ["class", "from_config"])
def test_a_constructor_may_use_values_of_modules_inside(
    way: str, tmp_path: Path, rank: int
) -> None:
    import transformers

    def build() -> Any:
        transformers.set_seed(5)
        if way == "class":
            return transformers.DetrForObjectDetection(detr_config())
        return transformers.AutoModelForObjectDetection.from_config(detr_config())

    whole = saved_by_one(build(), tmp_path / "whole", rank)
    with block(tmp_path):
        model = build()
    trainer = make_trainer(tmp_path / "run", stage=3, model=model)
    trainer.save_model(str(tmp_path / "saved"))
    trainer.close()
    assert not differences(in_files(tmp_path / "saved"), in_files(whole))


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "change",
    [
        {"new_num_tokens": 77},
        {"new_num_tokens": 77, "mean_resizing": False},
        {"new_num_tokens": 70, "pad_to_multiple_of": 16},
        {"new_num_tokens": 50},
    ],
)
def test_a_vocabulary_is_resized_inside_the_block(
    change: dict[str, Any], tmp_path: Path, rank: int
) -> None:
    """As for a whole model, number for number: old rows, new rows, tied ones, their biases."""
    for name, overrides in (
        ("LlamaForCausalLM", {"tie_word_embeddings": False}),
        ("LlamaForCausalLM", {"tie_word_embeddings": True}),
        ("BertForMaskedLM", {}),
        ("BartForConditionalGeneration", {}),
        ("T5ForConditionalGeneration", {}),
        (VISION_LANGUAGE[0], {}),
        (VISION_LANGUAGE[2], {}),
    ):
        whole = tiny(name, **overrides)
        saved_by_one(whole, tmp_path / "stored", rank)
        torch.manual_seed(11)
        whole.resize_token_embeddings(**change)
        with block(tmp_path):
            model = type(whole).from_pretrained(tmp_path / "stored")
            torch.manual_seed(11 + rank)
            embeddings = model.resize_token_embeddings(**change)
        assert_partitioned(model)
        assert embeddings is model.get_input_embeddings()
        assert differences(whole.state_dict(), whole_state(model)) == [], name
        assert len(list(whole.parameters())) == len(list(model.parameters())), name
        sizes = [m.config.get_text_config().vocab_size for m in (whole, model)]
        assert sizes[0] == sizes[1]


@pytest.mark.ranks(2)
def test_after_the_block_a_vocabulary_cannot_be_resized(tmp_path: Path, rank: int) -> None:
    """Built or loaded in it, or taken apart by a training: said before anything changes."""
    from dstrain.core.errors import ModelError

    whole = tiny("LlamaForCausalLM")
    saved_by_one(whole, tmp_path / "stored", rank)
    with block(tmp_path):
        loaded = type(whole).from_pretrained(tmp_path / "stored")
        built = type(whole)._from_config(whole.config)
    for model in (loaded, built):
        before = whole_state(model)
        with pytest.raises(ModelError, match="inside `with dstrain.partitioned"):
            model.resize_token_embeddings(100)
        assert differences(before, whole_state(model)) == []
        with pytest.raises(ModelError, match="save_model"):
            model.save_pretrained(tmp_path / "own")
    whole.resize_token_embeddings(100)  # a whole one is nobody's business
    trainer = trained(tmp_path / "run", whole, stage=3)
    with pytest.raises(ModelError, match="inside `with dstrain.partitioned"):
        whole.resize_token_embeddings(120)
    trainer.close()


class Copies(torch.nn.Module):
    """Uses the weights of a part that was built inside of the block, in a way of its own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        import transformers

        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        config = transformers.LlamaConfig(vocab_size=40, num_attention_heads=2, **sizes)
        self.part = transformers.AutoModelForCausalLM.from_config(config)
        table = self.part.get_input_embeddings().weight
        self.head = torch.nn.Linear(16, 40)
        if way == "data":
            self.head.weight.data.copy_(table.data)
        elif way == "clone":
            self.head.weight = torch.nn.Parameter(table.detach().clone())
        elif way == "change":
            with torch.no_grad():
                table.mul_(2.0)
        elif way == "number":
            self.register_buffer("size", table.norm().detach())
        elif way == "change of data":
            table.data.mul_(2.0).add_(1.0)
        elif way == "format":
            self.part.half().float()  # does not gather, and leaves it in parts
        elif way == "deepcopy":
            self.copied = copy.deepcopy(self.part.get_input_embeddings())
        elif way == "row":
            table.data[3].zero_()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("way", ["data", "clone", "change", "change of data", "number", "deepcopy"])
def test_a_constructor_may_use_a_part_that_was_built_in_the_block(
    way: str, tmp_path: Path, rank: int
) -> None:
    import transformers

    transformers.set_seed(5)
    whole = Copies(way).state_dict()
    transformers.set_seed(5)
    with block(tmp_path):
        model = Copies(way)
    assert not differences(whole_state(model), whole)


@pytest.mark.ranks(2)
def test_a_constructor_that_converts_such_a_part_leaves_it_in_parts(tmp_path: Path) -> None:
    with block(tmp_path):
        model = Copies("format")
    assert_partitioned(model.part)


@pytest.mark.ranks(2)
def test_a_constructor_that_changes_a_row_of_such_a_part_is_told(tmp_path: Path) -> None:
    from dstrain.core.errors import ModelError

    with pytest.raises(ModelError, match="changes a part of a weight in place"), block(tmp_path):
        Copies("row")
