"""What the engine looks at before it builds: disks for NVMe, ops, blocks of experts."""

from __future__ import annotations

import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dstrain.arguments import TrainingArguments
from dstrain.config import Facts, resolve
from dstrain.core.errors import ConfigError, ModelError
from dstrain.engine import ops
from dstrain.engine.leaf import check_leaf_modules, expert_blocks
from dstrain.engine.nvme import nvme_folders, prepare_nvme
from dstrain.trainer.build import start_run


def resolved(**arguments: Any):
    return resolve(TrainingArguments(**arguments), Facts())


# --- NVMe ----------------------------------------------------------------------------------------


def on_disk(path: Path):
    return resolved(offload_optimizer="nvme", offload_param="nvme", nvme_path=str(path))


def test_without_nvme_nothing_is_looked_at(monkeypatch):
    monkeypatch.setattr(ops, "check_buildable", lambda name: pytest.fail("looked"))
    prepare_nvme(resolved(offload_optimizer="cpu"))


def test_a_folder_that_does_not_exist_is_refused_for_each_key(tmp_path):
    with pytest.raises(ConfigError) as caught:
        prepare_nvme(on_disk(tmp_path / "nowhere"))
    assert [p.what.split("=")[0] for p in caught.value.problems] == list(
        nvme_folders(on_disk(tmp_path))
    )
    assert all("no such folder" in p.why for p in caught.value.problems)


def test_a_folder_that_cannot_be_written_is_refused():
    if not os.path.isdir("/proc/1"):
        pytest.skip("needs a folder that nobody can write to")
    with pytest.raises(ConfigError, match="cannot be written"):
        prepare_nvme(on_disk(Path("/proc/1")))


def test_the_op_is_checked_then_built(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "check_buildable", lambda name: asked.append(("check", name)))
    monkeypatch.setattr(ops, "build_ops", lambda names: asked.append(("build", *names)))
    prepare_nvme(on_disk(tmp_path))
    assert asked == [("check", "async_io"), ("build", "async_io")]
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize("compatible", [True, False])
def test_an_op_that_lacks_a_library_is_refused_before_its_build(tmp_path, monkeypatch, compatible):
    """A build of five minutes must not be where a missing header is found."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    builder = types.SimpleNamespace(is_compatible=lambda verbose: compatible)
    monkeypatch.setattr(ops, "_builder", lambda name: builder)
    if compatible:
        ops.check_buildable("async_io")
        return
    with pytest.raises(ConfigError, match="apt-get install libaio-dev"):
        ops.check_buildable("async_io")


# --- leaf modules --------------------------------------------------------------------------------


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


# --- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "given", "why"),
    [
        ("linear", {"num_cycles": 1}, "unexpected keyword argument 'num_cycles'"),
        ("cosine", {"num_cycles": "x"}, "'x'|str"),
        ("polynomial", {"lr_end": 1.0}, "lr_end"),
        ("cosine_with_min_lr", {"min_lr": None}, "min_lr"),
    ],
)
def test_arguments_that_a_schedule_does_not_take_are_refused_at_the_start(kind, given, why):
    """They were a TypeError when the engine was built, on each rank."""
    args = TrainingArguments(lr_scheduler_type=kind, lr_scheduler_kwargs=given, use_cpu=True)
    with pytest.raises(ConfigError, match=rf"lr_scheduler_type='{kind}' with .*(.|\n)*{why}"):
        start_run(args)
