"""Buckets and thresholds from real parameter shapes, whatever the architecture is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from typing import Any

import pytest
import torch
from torch import nn

from dstrain.arguments import TrainingArguments
from dstrain.cli import explain
from dstrain.config import Facts, ResolvedConfig, resolve
from dstrain.config.memory.bucket_rule import BUCKET_ELEMENTS, SMALL_PARAMETER_ELEMENTS
from dstrain.models import sizes_of_module
from tests.models import RegressionModel

VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
          "num_attention_heads": 4, "image_size": 28, "patch_size": 14}  # fmt: skip
TEXT = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2000}  # fmt: skip
# name -> (class, model type, values of its config)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "text": ("LlamaForCausalLM", "llama", TEXT),
    "encoder-decoder": ("T5ForConditionalGeneration", "t5", {"d_model": 128, "num_layers": 2}),
    "vision-language, text_config": (
        "LlavaForConditionalGeneration",
        "llava",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
        },
    ),
    "vision-language, nested": (
        "Qwen2VLForConditionalGeneration",
        "qwen2_vl",
        {
            "text_config": {"model_type": "qwen2_vl_text", **TEXT},
            "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 96, "num_heads": 4},
        },
    ),
    "experts": ("MixtralForCausalLM", "mixtral", {**TEXT, "num_local_experts": 4}),
    "many experts": (
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        {**TEXT, "num_experts": 16, "moe_intermediate_size": 48, "head_dim": 32},
    ),
}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def on_no_memory(name: str) -> nn.Module:
    import transformers

    cls, kind, values = ARCHITECTURES[name]
    config = transformers.AutoConfig.for_model(kind, **values)
    with torch.device("meta"):
        return getattr(transformers, cls)(config)


def known(module: nn.Module) -> Facts:
    sizes = sizes_of_module(module)
    return Facts(world_size=4, model=sizes.facts, sizes=sizes)


def keys(got: ResolvedConfig) -> dict[str, int]:
    return {k.partition(".")[2]: v for k, v in got.values.items() if k.startswith("zero_opt")}


def shapes(module: nn.Module) -> Iterator[tuple[int, ...]]:
    return (tuple(p.shape) for p in module.parameters())


def check(module: nn.Module, stage: int) -> dict[str, int]:
    """Check that the sizes hold no more than the model, and keep norms and biases whole."""
    found = keys(resolve(TrainingArguments(zero_stage=str(stage)), known(module)))
    total = sum(p.numel() for p in module.parameters())
    vector = max(prod(s) for s in shapes(module) if len(s) <= 1)
    expected = min(total, BUCKET_ELEMENTS)
    assert expected <= found["reduce_bucket_size"] <= expected + 1
    if stage < 3:
        assert found["allgather_bucket_size"] == found["reduce_bucket_size"]
        assert "stage3_prefetch_bucket_size" not in found
    else:
        assert expected <= found["stage3_prefetch_bucket_size"] <= expected + 1
        assert found["stage3_param_persistence_threshold"] == max(vector, SMALL_PARAMETER_ELEMENTS)
    return found


@pytest.mark.parametrize("stage", [2, 3])
@every_architecture
def test_sizes_come_from_the_parameters(name, stage):
    """transformers reads ``hidden_size`` instead: it fails on nested configs, ignores experts."""
    check(on_no_memory(name), stage)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_plain_module_has_sizes_too(stage):
    check(RegressionModel(), stage)


def test_experts_count_with_all_of_their_width():
    """transformers 5 keeps the experts of a layer in one parameter, wider than hidden x hidden."""
    module = on_no_memory("many experts")
    largest = max(p.numel() for p in module.parameters())
    assert largest > 5 * TEXT["hidden_size"] ** 2
    assert known(module).model.largest == largest


def test_wide_layers_do_not_blow_the_buckets_up_nor_narrow_ones_shrink_them():
    """hidden^2 is 67 million elements at 8192, and 4096 at 64: thousands of tiny collectives."""
    wide = nn.Sequential(*[nn.Linear(8192, 1024, device="meta") for _ in range(20)])
    found = check(wide, 2)
    assert found["reduce_bucket_size"] == BUCKET_ELEMENTS < 8192**2
    narrow = nn.Sequential(*[nn.Linear(64, 64, device="meta") for _ in range(200)])
    total = sum(p.numel() for p in narrow.parameters())
    assert check(narrow, 2)["reduce_bucket_size"] == total


def test_frozen_parameters_are_gathered_but_not_reduced():
    module = on_no_memory("text")
    for name, parameter in module.named_parameters():
        parameter.requires_grad = "layers.0" in name
    found = keys(resolve(TrainingArguments(zero_stage="3"), known(module)))
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert found["reduce_bucket_size"] - trainable in (0, 1)
    assert found["stage3_prefetch_bucket_size"] > found["reduce_bucket_size"]


@pytest.mark.parametrize(
    "name",
    [
        "text",
        "encoder-decoder",
        "experts",
        "many experts",
        pytest.param("vision-language, text_config", marks=pytest.mark.slow),
        pytest.param("vision-language, nested", marks=pytest.mark.slow),
    ],
)
def test_explain_says_the_same_from_the_config_alone(name, tmp_path, capsys):
    """What is printed before there is a GPU is what the run will use."""
    cls, kind, values = ARCHITECTURES[name]
    content = {"model_type": kind, "architectures": [cls], **values}
    (tmp_path / "config.json").write_text(json.dumps(content))
    words = ["--zero_stage", "3", "--world_size", "4", "--json"]
    assert explain.run([*words, "--model_config", str(tmp_path / "config.json")]) == 0
    said = json.loads(capsys.readouterr().out)
    module = on_no_memory(name)
    got = resolve(TrainingArguments(zero_stage="3"), known(module))
    assert said["deepspeed"]["zero_optimization"] == got.to_deepspeed()["zero_optimization"]
    assert said["facts"]["model"]["num_parameters"] == sum(p.numel() for p in module.parameters())
