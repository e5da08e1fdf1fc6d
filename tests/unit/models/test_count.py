"""Parameters counted from a config: closed forms agree with the models that transformers builds."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from dstrain.config.memory.closed_forms import FAMILIES, closed_form, sizes_of
from dstrain.config.memory.model_spec import read_spec
from dstrain.config.memory.sizes import ModelSizes
from dstrain.core.errors import ModelError

# Beside every family's defaults: what the defaults do not reach.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FAMILIES),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 8, "head_dim": 64}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3}),
    ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
    ("qwen3", {"num_key_value_heads": 8, "head_dim": 80}),
    ("mixtral", {"num_local_experts": 4, "num_hidden_layers": 2}),
    ("qwen3_moe", {"num_experts": 16, "moe_intermediate_size": 96, "num_hidden_layers": 2}),
    ("phi3", {"num_key_value_heads": 8}),
    ("gpt2", {"n_embd": 96, "n_head": 4, "n_layer": 3, "n_inner": 100, "n_positions": 50}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("opt", {"word_embed_proj_dim": 96, "do_layer_norm_before": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 8, "num_attention_heads": 64,
                "hidden_size": 512, "num_hidden_layers": 2}),
    ("falcon", {"parallel_attn": False, "bias": True, "num_hidden_layers": 2}),
    ("falcon", {"multi_query": False, "num_hidden_layers": 2}),
    ("bloom", {"hidden_size": 128, "n_layer": 4}),
    ("t5", {"feed_forward_proj": "gated-gelu", "d_kv": 32}),
    ("t5", {"num_layers": 2, "num_decoder_layers": 3}),
    ("t5", {"feed_forward_proj": "relu", "is_gated_act": True, "num_layers": 2}),
    ("bert", {"type_vocab_size": 4, "intermediate_size": 100}),
]  # fmt: skip


def shapes(sizes: ModelSizes) -> Counter[tuple[int, ...]]:
    found: Counter[tuple[int, ...]] = Counter()
    for t in sizes.tensors:
        found[t.shape] += t.count
    return found


def built(name: str, values: dict[str, Any]) -> Any:
    """Build the model itself on the meta device."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(name, **values)
    with torch.device("meta"):
        return getattr(transformers, FAMILIES[name].architectures[0])(config)


@pytest.mark.parametrize(("name", "values"), VARIANTS)
def test_closed_form_is_the_built_model(name, values):
    """Every shape and its count, so that the largest and the small ones are right too."""
    module = built(name, values)
    got = closed_form({"model_type": name, **values}, strict=True)
    assert got is not None
    assert shapes(got) == Counter(tuple(p.shape) for p in module.parameters())
    # What save_pretrained would write says the same, whatever else stands in it.
    written = json.loads(module.config.to_json_string())
    again = closed_form({**written, "architectures": [FAMILIES[name].architectures[0]]})
    assert again is not None
    assert shapes(again) == shapes(got)
    assert again.vocab_size == module.config.vocab_size


def test_facts_are_those_of_the_engine():
    from dstrain.engine import model_facts

    values = {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2}
    module = built("llama", values)
    got = closed_form({"model_type": "llama", **values})
    assert got is not None
    assert got.facts == model_facts(module)


def test_parts_are_told_apart():
    got = closed_form({"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 100})
    assert got is not None
    assert got.elements("embedding") == got.elements("head") == 100 * 4096
    assert got.elements("other") == 4096
    assert got.layer_elements == 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert got.elements() == sum(got.elements(p) for p in ("embedding", "layer", "head", "other"))
    assert got.elements_up_to(10_000) == 5 * 4096


def test_partition_is_padded_per_parameter():
    """As ``partition_parameters.py`` does: 3 ranks hold 34 + 1 of 100 + 2 elements."""
    from dstrain.config.memory.sizes import Tensors

    sizes = ModelSizes("x", "test", (Tensors("other", (100,)), Tensors("other", (2,))), 0, None)
    assert sizes.partition_elements(3) == 35


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "mamba"},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "llama", "quantization_config": {"bits": 4}},
        {"model_type": "gpt_neox", "attention_bias": False},
    ],
)
def test_no_closed_form_where_none_is_known_to_hold(values):
    assert closed_form(values) is None


def test_a_key_that_the_formula_does_not_read_is_left_to_transformers():
    """Catches a misspelt key that would change nothing."""
    asked = []

    def count(spec: str) -> ModelSizes:
        asked.append(spec)
        return ModelSizes("llama", "counted", (), 0, None)

    assert sizes_of("llama:hiden_size=64", count).source == "counted"
    assert asked == ["llama:hiden_size=64"]
    assert sizes_of("llama:hidden_size=64", count).source == "closed form"


def test_sizes_survive_json():
    got = closed_form({"model_type": "mixtral", "num_hidden_layers": 2})
    assert got is not None
    assert ModelSizes.from_dict(json.loads(json.dumps(got.to_dict()))) == got


def test_a_file_and_a_folder_are_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    for spec in (str(tmp_path), str(tmp_path / "config.json")):
        assert read_spec(spec) == ({"model_type": "llama", "hidden_size": 64}, False)
    assert read_spec("llama:tie_word_embeddings=True, hidden_size=64") == (
        {"model_type": "llama", "tie_word_embeddings": True, "hidden_size": 64},
        True,
    )


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model_type": null}'])
def test_a_file_that_is_no_config_is_refused(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ModelError, match=r"model.config.*config.json"):
        read_spec(str(file))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mixtral"])
def test_counting_the_built_model_agrees(name):
    """The two ways to the sizes are interchangeable."""
    from dstrain.models.count import count_parameters

    spec = f"{name}:vocab_size=1000"
    counted, formula = count_parameters(spec), closed_form(read_spec(spec)[0])
    assert formula is not None
    assert shapes(counted) == shapes(formula)
    assert counted.facts == formula.facts
    assert counted.vocab_size == formula.vocab_size == 1000
    assert counted.block is not None
    assert counted.block.layers == formula.block.layers


@pytest.mark.parametrize(
    "spec",
    ["mamba:vocab_size=99", "whisper", "modernbert", "blip_vision_model", "prompt_depth_anything"],
)
def test_architectures_without_a_closed_form_are_counted(spec):
    from dstrain.models.count import count_parameters

    assert count_parameters(spec).elements() > 1e6


def test_layers_that_differ_in_width_are_counted_by_the_largest():
    """Catches the ``RuntimeError`` with which such a config answers: no Gemma 4 would train."""
    from dstrain.models.count import count_parameters

    got = count_parameters("gemma4_text:num_hidden_layers=6,hidden_size=64,vocab_size=100")
    assert got.block is not None
    assert got.block.head_dim == 512  # 256 in the layers with a sliding window
    assert not got.text_only


def test_a_text_model_among_other_parts_is_said_to_be_one():
    """Activations of a vision tower are not known, so the plan must not look complete."""
    from dstrain.models.count import count_parameters

    got = count_parameters("gemma3")
    assert got.text_only
    assert ModelSizes.from_dict(json.loads(json.dumps(got.to_dict()))) == got


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("sam_mask_decoder", "the config of a part"),
        ("llama:hidden_size=100,num_attention_heads=3", "num_attention_heads"),
        ("time_series_transformer", "prediction_length"),
    ],
)
def test_what_cannot_be_built_is_one_line_with_the_reason(spec, said):
    """Catches a traceback of transformers, or the list of all its classes, as an answer."""
    from dstrain.models.count import count_parameters

    with pytest.raises(ModelError, match=said) as caught:
        count_parameters(spec)
    assert len(str(caught.value)) < 1000
