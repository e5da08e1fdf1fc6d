"""Modules that stage 3 gathers whole: blocks of experts, and names of classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dstrain.arguments import TrainingArguments
from dstrain.config import Facts, resolve
from dstrain.core.errors import ModelError
from dstrain.engine.model_checks.leaf_modules import check_leaf_modules, expert_blocks


def resolved(**arguments: Any):
    return resolve(TrainingArguments(**arguments), Facts())


class Block(nn.Module):
    def __init__(self, experts: nn.Module, name: str = "experts") -> None:
        super().__init__()
        self.add_module(name, experts)


def linears(count: int) -> list[nn.Module]:
    return [nn.Linear(2, 2) for _ in range(count)]


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (Block(nn.ModuleList(linears(2))), True),
        (Block(nn.ModuleDict({"expert_0": nn.Linear(2, 2), "expert_1": nn.Linear(2, 2)})), True),
        (Block(nn.ModuleList(linears(2)), "local_experts"), True),
        (Block(nn.ModuleList(linears(2)), "layers"), False),
        (Block(nn.ModuleList(linears(1))), False),
        (Block(nn.ModuleList([nn.ReLU(), nn.ReLU()])), False),
        (Block(nn.Linear(2, 2)), False),
        (Block(nn.ModuleList(linears(2)), "expertise"), False),
    ],
    ids=["list", "dict", "local_experts", "layers", "one", "no parameters", "fused", "expertise"],
)
def test_blocks_of_experts_are_told_by_the_module_tree(module, found):
    name = f"{Block.__module__}.Block"
    assert expert_blocks(nn.Sequential(module)) == ((name,) if found else ())


def test_blocks_of_transformers_are_found_without_a_list():
    """Switch Transformers keeps experts as modules; Qwen's are slices of one parameter."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersForConditionalGeneration,
    )

    with torch.device("meta"):
        switch = SwitchTransformersForConditionalGeneration(
            SwitchTransformersConfig(
                vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_decoder_layers=2,
                num_heads=2, num_experts=4, num_sparse_encoder_layers=1,
                num_sparse_decoder_layers=1,
            )
        )  # fmt: skip
        qwen = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                vocab_size=32, hidden_size=8, intermediate_size=8, moe_intermediate_size=8,
                num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=4,
                num_experts=4, num_experts_per_tok=1,
            )
        )  # fmt: skip
    (name,) = expert_blocks(switch)
    assert name.endswith(".SwitchTransformersSparseMLP")
    assert expert_blocks(qwen) == ()


def test_a_leaf_class_is_found_with_and_without_its_package():
    module = nn.Sequential(Block(nn.Linear(2, 2)))
    for name in ("Block", f"{Block.__module__}.Block"):
        check_leaf_modules(module, resolved(zero_stage=3, leaf_modules=[name]))
    with pytest.raises(ModelError, match="it has Block"):
        check_leaf_modules(module, resolved(zero_stage=3, leaf_modules=["Blok"]))
    check_leaf_modules(module, resolved(zero_stage=3))
