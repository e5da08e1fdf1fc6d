"""Sizes of modules: of a config before the model is built, and of the model itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from dstrain.config.memory.closed_forms import closed_form
from dstrain.models import count_causal_lm, sizes_of_module
from tests.models import RegressionModel, tiny_llama, tiny_llama_config


def test_a_config_gives_the_sizes_of_its_model():
    """What is decided before the model is built must hold for the built one, to the byte."""
    before = count_causal_lm(tiny_llama_config())
    after = sizes_of_module(tiny_llama())
    assert dataclasses.replace(before, source=after.source) == after
    assert after.facts.num_parameters == sum(p.numel() for p in tiny_llama().parameters())


def test_counting_changes_no_config():
    config = tiny_llama_config()
    before = config.to_dict()
    count_causal_lm(config)
    assert config.to_dict() == before


@pytest.mark.parametrize("kind", ["gpt2", "t5", "falcon", "qwen3"])
def test_the_form_of_a_layer_is_that_of_the_formula(kind):
    """Names alone do not tell dropout or what an activation function keeps."""
    import transformers

    from dstrain.config.memory.closed_forms import FAMILIES

    config = transformers.AutoConfig.for_model(kind)
    with torch.device("meta"):
        module = getattr(transformers, FAMILIES[kind].architectures[0])(config)
    formula = closed_form({"model_type": kind})
    assert formula is not None
    assert sizes_of_module(module).block == formula.block


def test_without_a_formula_names_and_config_tell_the_form():
    import transformers

    config = transformers.Olmo2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=99,
    )  # fmt: skip
    block = count_causal_lm(config).block
    assert block is not None
    assert (block.layers, block.hidden, block.heads, block.kv_heads) == (3, 64, 4, 2)
    assert (block.ffn, block.gated, block.rms_norm, block.norms) == (96, True, True, 2)
    assert block.qk_norm


def test_a_plain_module_has_sizes_and_no_layers():
    found = sizes_of_module(RegressionModel())
    assert found.model_type == "RegressionModel"
    assert found.block is None
    assert found.vocab_size == 0
    assert found.facts.num_parameters == 8 * 16 + 16 + 2 * 16 + 16 + 1


def test_shared_parameters_count_once_and_frozen_ones_are_told_apart():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    assert sizes_of_module(module).facts.num_parameters == 9
    module[0].weight.requires_grad = False
    assert sizes_of_module(module).facts.num_trainable == 0
