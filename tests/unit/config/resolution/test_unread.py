"""Keys that DeepSpeed knows and that would not do what they say: refused, or a warning."""

from __future__ import annotations

from typing import Any

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.config import Facts, ResolvedConfig, resolve
from dstrain.config.resolution.unread import find_unread
from dstrain.core.errors import ConfigError


def resolved(config: Any, **arguments: Any) -> ResolvedConfig:
    return resolve(TrainingArguments(deepspeed=config, **arguments), Facts(world_size=4))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"gradient_allreduce_op": "Sum"}, "gradient_allreduce_op='Sum'"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation=False"),
        ({"dataloader_drop_last": True}, "set the argument dataloader_drop_last"),
        ({"data_efficiency": {"data_sampling": {"enabled": True}}}, "data_sampling.enabled=True"),
        ({"hybrid_engine": {"enabled": True}}, "hybrid_engine.enabled=True"),
        ({"expert_parallel": {"enabled": True}}, "expert_parallel.enabled=True"),
        ({"autotuning": {"enabled": True}}, "dstrain plan"),
        ({"compile": {"deepcompile": True}}, "set torch_compile"),
    ],
    ids=str,
)
def test_what_would_not_be_done_is_refused(config, named):
    """DeepSpeed takes each of them without a word."""
    with pytest.raises(ConfigError) as caught:
        resolved(config)
    (problem,) = caught.value.problems
    assert named in str(problem)
    assert problem.why
    assert problem.remedy


@pytest.mark.parametrize(
    "config",
    [
        {"gradient_allreduce_op": "mean"},
        {"managed_gradient_accumulation": True, "dataloader_drop_last": False},
        {"data_efficiency": {"enabled": True, "data_sampling": {"enabled": False}}},
        {"hybrid_engine": {"enabled": False}, "autotuning": {"enabled": False}},
        {"compile": {"deepcompile": False}, "expert_parallel": {"enabled": False}},
        {"steps_per_print": 5, "wall_clock_breakdown": True, "memory_breakdown": True},
    ],
    ids=str,
)
def test_what_asks_for_nothing_passes_without_a_word(config):
    assert resolved(config).warnings == ()


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"pipeline": {"stages": 2}}, "pipeline"),
        ({"disable_allgather": True}, "disable_allgather"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint"),
        ({"zero_optimization": {"elastic_checkpoint": True}}, "elastic_checkpoint"),
    ],
    ids=str,
)
def test_what_nothing_reads_and_does_no_harm_is_a_warning(config, key):
    (warning,) = resolved(config).warnings
    assert warning.split(" has no effect: ")[0].endswith(key)


def test_refusals_come_with_all_other_conflicts():
    with pytest.raises(ConfigError) as caught:
        resolved({"gradient_allreduce_op": "sum", "gradient_clipping": 0.5}, max_grad_norm=0.1)
    assert len(caught.value.problems) == 2


def test_keys_about_checkpoints_have_their_effect_in_deepspeeds_own_layout():
    values = {"checkpoint.load_universal": True}
    assert find_unread(values, {"checkpoint_format": "deepspeed"}, "x") == ([], [])
    assert find_unread(values, {}, "x")[1]


def test_deepcompile_is_a_way_to_compile():
    values = {"compile.deepcompile": True}
    assert find_unread(values, {"torch_compile": True}, "x") == ([], [])


@pytest.mark.parametrize("stage", [2, 3])
def test_gathering_on_save_may_be_auto(stage):
    """Configs written for accelerate have it."""
    name = "stage3_gather_16bit_weights_on_model_save"
    got = resolved({"zero_optimization": {"stage": stage, name: "auto"}})
    assert got.values.get(f"zero_optimization.{name}") is (False if stage == 3 else None)
