"""The schema finds what is wrong in a DeepSpeed config, and reads what is right."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from dstrain.config import schema
from dstrain.config.resolution.source import preset_folder
from dstrain.config.schema.check import find_entries
from dstrain.config.schema.entry import NO_DEFAULT, Section
from tests.unit.config.schema.paths import nest

# --- what check accepts --------------------------------------------------------------------------

HUGGING_FACE_STAGE_3 = {
    "_comment": "the config that most people start from",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": "auto",
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
        },
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "nvme", "nvme_path": "/scratch"},
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


@pytest.mark.parametrize(
    "config",
    [
        {},
        HUGGING_FACE_STAGE_3,
        {"steps_per_print": math.inf},
        {"gradient_clipping": "1e0", "train_batch_size": "16", "vocabulary_size": 5e4},
        {"gradient_clipping": 1, "optimizer": {"type": "adamw", "params": {"betas": (0.9, 1 / 3)}}},
        {"optimizer": {"type": "NAdam", "params": {"momentum_decay": 4e-3, "eps": [None, 1]}}},
        {"optimizer": {"type": "Muon", "params": {"muon_lr": 0.02, "ns_method": "standard"}}},
        {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": [0.1, 0.2]}}},
        {"scheduler": {"type": "StepLR", "params": {"step_size": 30, "gamma": 0.1}}},
        {"checkpoint": {"tag_validation": "Ignore", "writer": None}},
        {"aio": None, "bf16": None, "zero_optimization": {"leaf_module": {"names": "block"}}},
        {"datastates_ckpt": {"host_cache_size": 16}, "pipeline": {"stages": 4}},
        {"datastates_ckpt": True, "zero_optimization": {"offload_optimizer": {"ratio": 1}}},
        {"tensor_parallel": {"tp": {"mpu": object()}, "dtype": object()}},
        {"zero_optimization": {"offload_param": {"nvme_path": Path("/scratch")}}},
        {"weight_quantization": {"post_init_quant": {"fc": {"num_bits": 4}}}},
        {"expert_parallel": {"top_k": "auto", "score_func": "sigmoid", "expert_w3": None}},
        {"data_efficiency": {"data_sampling": {"curriculum_learning": {"curriculum_metrics": {
            "_my metric": {"min_difficulty": 8, "schedule_config": {"difficulty": [1, 2.5]}}
        }}}}},
    ],
)  # fmt: skip
def test_good_configs_have_no_problems(config: dict[str, Any]) -> None:
    assert schema.check(config) == []


def test_every_preset_of_ours_is_accepted() -> None:
    presets = list(preset_folder().glob("*.json"))
    assert presets
    for path in presets:
        assert schema.check(json.loads(path.read_text())) == [], path.name


def test_auto_is_accepted_for_every_single_value() -> None:
    for path in schema.known_paths():
        if _is_plain(path):
            assert schema.check(nest(path, "auto")) == [], path


# --- what check refuses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "what", "hint"),
    [
        # Unknown keys: the nearest of the same section, or the section where the name belongs.
        ({"gradient_cliping": 1.0}, "gradient_cliping", "did you mean gradient_clipping?"),
        ({"zero_optimisation": {}}, "zero_optimisation", "did you mean zero_optimization?"),
        ({"zero_optimization": {"stage3_param_persitance_threshold": 1}},
         "zero_optimization.stage3_param_persitance_threshold",
         "did you mean zero_optimization.stage3_param_persistence_threshold?"),
        ({"offload_optimizer": {"device": "cpu"}}, "offload_optimizer",
         "it belongs in zero_optimization"),
        ({"stage": 2}, "stage", "it belongs in zero_optimization"),
        ({"fp16": {"gradient_clipping": 1}}, "fp16.gradient_clipping",
         "it belongs in the top level"),
        ({"bf16": {"initial_scale_power": 16}}, "bf16.initial_scale_power", "it belongs in fp16"),
        ({"optimizer": {"adam_w_mode": True}}, "optimizer.adam_w_mode",
         "it belongs in optimizer.params"),
        ({"fp16": {"overlap_com": True}}, "fp16.overlap_com",
         "did you mean zero_optimization.overlap_comm?"),
        ({"zqxj": 1}, "zqxj", "remove it"),
        # What DeepSpeed removed belongs nowhere.
        ({"mics_shard_size": 1}, "mics_shard_size", "remove it"),
        ({"enabled": True}, "enabled", "remove it"),
        ({1: 2}, "1", "remove it"),
        ({"optimizer": {"type": "AdamW", "params": {"bettas": [0.9, 0.99]}}},
         "optimizer.params.bettas", "did you mean optimizer.params.betas?"),
        ({"optimizer": {"type": "adamw", "params": {"momentum": 0.9}}},
         "optimizer.params.momentum", ""),
        ({"optimizer": {"params": {"bettas": 1}}}, "optimizer.params.bettas",
         "did you mean optimizer.params.betas?"),
        ({"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 10}}},
         "scheduler.params.total_num_steps", ""),
        ({"tensor_parallel": {"partition_config": {"layer_specs": [{"pattern": ["a"]}]}}},
         "tensor_parallel.partition_config.layer_specs[0].pattern", ".patterns?"),
        ({"data_efficiency": {"data_sampling": {"curriculum_learning": {"curriculum_metrics": {
            "seqlen": {"min_dificulty": 8}}}}}},
         "data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.seqlen.min_dificulty",
         ".min_difficulty?"),
        # Removed keys and values.
        ({"elasticity": {"enabled": True}}, "elasticity", "set train_batch_size"),
        ({"amp": {"enabled": "auto"}}, "amp", "bf16, fp16 or torch_autocast"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "zero_optimization.mics_shard_size",
         "zero_hpz_partition_size"),
        ({"zero_optimization": {"cpu_offload_use_pin_memory": True}},
         "zero_optimization.cpu_offload_use_pin_memory", "pin_memory inside offload_optimizer"),
        ({"optimizer": {"type": "OneBitAdam"}}, "optimizer.type", "use AdamW"),
        ({"optimizer": {"type": "RMSprop", "params": {"max_grad_norm": 1.0}}},
         "optimizer.params.max_grad_norm", "set gradient_clipping"),
        # Types.
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage", "default, 0"),
        ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage", "default, 0"),
        ({"bf16": {"enabled": "true"}}, "bf16.enabled", "write true, without quotes"),
        ({"bf16": {"enabled": 0}}, "bf16.enabled", "write false, without quotes"),
        ({"bf16": True}, "bf16", "keys such as enabled"),
        ({"fp16": "auto"}, "fp16", "keys such as enabled"),
        ({"wandb": None}, "wandb", "keys such as enabled"),
        ({"zero_optimization": {"sub_group_size": 5.5}}, "zero_optimization.sub_group_size", ""),
        ({"train_batch_size": "nan"}, "train_batch_size", ""),
        ({"gradient_clipping": math.nan}, "gradient_clipping", "default, 1.0"),
        ({"gradient_clipping": None}, "gradient_clipping", "default, 1.0"),
        ({"gradient_clipping": [1.0]}, "gradient_clipping", "default, 1.0"),
        ({"wandb": {"project": 5}}, "wandb.project", "deepspeed"),
        ({"train_batch_size": math.inf}, "train_batch_size", "leave it out"),
        ({"tensor_parallel": {"dtype": "fp16"}}, "tensor_parallel.dtype", ""),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, "much"]}}},
         "optimizer.params.betas[1]", ""),
        ({"optimizer": {"type": "AdamW", "params": {"betas": ["auto", 0.9]}}},
         "optimizer.params.betas[0]", ""),
        # Ranges and choices.
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage", "default, 0"),
        ({"zero_optimization": {"reduce_bucket_size": "0"}},
         "zero_optimization.reduce_bucket_size", "500000000"),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 1.01}}},
         "zero_optimization.offload_optimizer.ratio", "default, 1.0"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 1}}},
         "zero_optimization.zenflow.topk_ratio", "default, 0.1"),
        ({"train_batch_size": 0}, "train_batch_size", "leave it out"),
        ({"zero_optimization": {"offload_param": {"device": "CPU"}}},
         "zero_optimization.offload_param.device", "did you mean 'cpu'?"),
        ({"optimizer": {"type": "sgd"}}, "optimizer.type", "did you mean 'SGD'?"),
        ({"scheduler": {"type": "warmuplr"}}, "scheduler.type", "did you mean 'WarmupLR'?"),
        ({"compile": {"passes": ["z1", "autotpp"]}}, "compile.passes[1]", "did you mean 'autotp'?"),
        # One setting under two names.
        ({"bf16": {}, "bfloat16": {}}, "bfloat16", "keep bf16 only"),
        ({"zero_optimization": {"cpu_offload": False, "offload_optimizer": {}}},
         "zero_optimization.cpu_offload", "keep zero_optimization.offload_optimizer only"),
        ({"zero_optimization": {"prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 1}},
         "zero_optimization.prefetch_bucket_size", "keep zero_optimization.stage3_"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_problem_with_its_path_and_remedy(
    config: dict[str, Any], what: str, hint: str
) -> None:
    (problem,) = schema.check(config)
    assert problem.what.startswith(f"{what} = ")
    assert hint in problem.remedy
    assert problem.why


def test_all_problems_come_at_once_and_name_the_value_and_its_type() -> None:
    problems = schema.check({"fp8": {}, "zero_optimization": {"stage": "two", "x": 1}, "amp": {}})
    assert [p.what for p in problems] == [
        "fp8 = {}", "zero_optimization.stage = 'two'", "zero_optimization.x = 1", "amp = {}",
    ]  # fmt: skip
    assert problems[1].why == "that is a string; DeepSpeed expects one of 0, 1, 2 or 3"


@pytest.mark.parametrize("config", [None, [], "zero2", 3])
def test_what_is_no_object_is_a_problem(config: Any) -> None:
    assert "object" in schema.check(config)[0].why


# --- normalise -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"gradient_clipping": "5e-5"}, {"gradient_clipping": 5e-5}),
        ({"gradient_clipping": "1"}, {"gradient_clipping": 1.0}),
        ({"gradient_clipping": 1}, {"gradient_clipping": 1}),
        ({"train_batch_size": "1e9"}, {"train_batch_size": 10**9}),
        ({"train_batch_size": 5e8}, {"train_batch_size": 500_000_000}),
        ({"train_batch_size": str(2**62 + 1)}, {"train_batch_size": 2**62 + 1}),
        ({"steps_per_print": math.inf}, {"steps_per_print": math.inf}),
        ({"train_batch_size": "auto"}, {"train_batch_size": "auto"}),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "5e-5", "betas": ["0.9", 0.99]}}},
         {"optimizer": {"type": "AdamW", "params": {"lr": 5e-5, "betas": [0.9, 0.99]}}}),
        ({"optimizer": {"type": "NAdam", "params": {"lr": "1e-3", "momentum_decay": "1"}}},
         {"optimizer": {"type": "NAdam", "params": {"lr": 1e-3, "momentum_decay": "1"}}}),
        ({"optimizer": {"params": {"lr": "1e-3"}}}, {"optimizer": {"params": {"lr": 1e-3}}}),
        ({"zero_optimization": {"zenflow": {"update_interval": "4"}}},
         {"zero_optimization": {"zenflow": {"update_interval": 4}}}),
        ({"wandb": {"group": "007"}}, {"wandb": {"group": "007"}}),
        ({"_comment": 1, "bf16": {"//": "why"}}, {"bf16": {}}),
        ({"datastates_ckpt": {"_mine": 1}}, {"datastates_ckpt": {"_mine": 1}}),
        ({"data_efficiency": {"data_sampling": {"curriculum_learning": {"curriculum_metrics": {
            "_mine": {"total": 1}}}}}},
         {"data_efficiency": {"data_sampling": {"curriculum_learning": {"curriculum_metrics": {
             "_mine": {"total": 1}}}}}}),
        ({"optimizer": {"type": "Lion", "params": {"betas": ("0.9", 0.99)}}},
         {"optimizer": {"type": "Lion", "params": {"betas": (0.9, 0.99)}}}),
        # What check objects to stays as it is.
        ({"gradient_cliping": "1", "train_batch_size": "many", "bf16": 1},
         {"gradient_cliping": "1", "train_batch_size": "many", "bf16": 1}),
    ],
)  # fmt: skip
def test_numbers_take_their_type_and_the_rest_is_untouched(
    given: dict[str, Any], expected: dict[str, Any]
) -> None:
    result, warnings = schema.normalise(given)
    assert result == expected
    assert warnings == []
    assert _typed(result) == _typed(expected)


@pytest.mark.parametrize(
    ("given", "expected", "named"),
    [
        ({"bfloat16": {"enabled": True}}, {"bf16": {"enabled": True}}, ("bfloat16", "bf16")),
        ({"zero_optimization": True}, {"zero_optimization": {"stage": 1}},
         ("zero_optimization", "'stage': 1")),
        ({"zero_optimization": {"cpu_offload": True}},
         {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
         ("zero_optimization.cpu_offload", "zero_optimization.offload_optimizer")),
        ({"zero_optimization": {"cpu_offload_param": True, "stage": 3}},
         {"zero_optimization": {"offload_param": {"device": "cpu"}, "stage": 3}},
         ("zero_optimization.cpu_offload_param", "zero_optimization.offload_param")),
        ({"zero_optimization": {"cpu_offload": False}}, {"zero_optimization": {}},
         ("zero_optimization.cpu_offload", "left out")),
        ({"zero_optimization": {"stage3_gather_fp16_weights_on_model_save": True}},
         {"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True}},
         ("zero_optimization.stage3_gather_fp16", "stage3_gather_16bit_weights_on_model_save = T")),
        ({"zero_optimization": {"prefetch_bucket_size": "1e7"}},
         {"zero_optimization": {"stage3_prefetch_bucket_size": 10_000_000}},
         ("zero_optimization.prefetch_bucket_size", "stage3_prefetch_bucket_size = 10000000")),
        ({"tensor_parallel": {"replace_with_kernel_inject": True}},
         {"tensor_parallel": {"kernel_inject": True}},
         ("tensor_parallel.replace_with_kernel_inject", "tensor_parallel.kernel_inject")),
        ({"allgather_size": 1e8}, {"zero_optimization": {"allgather_bucket_size": 10**8}},
         ("allgather_size", "zero_optimization.allgather_bucket_size")),
    ],
)  # fmt: skip
def test_other_spellings_are_renamed_with_a_warning(
    given: dict[str, Any], expected: dict[str, Any], named: tuple[str, str]
) -> None:
    assert schema.check(given) == []
    result, (warning,) = schema.normalise(given)
    assert result == expected
    assert warning.startswith(named[0])
    assert named[1] in warning
    assert schema.normalise(result) == (result, [])


def test_a_bad_value_keeps_its_old_spelling() -> None:
    given = {"zero_optimization": {"cpu_offload": "perhaps"}}
    assert len(schema.check(given)) == 1
    assert schema.normalise(given) == (given, [])


def test_the_input_is_neither_changed_nor_shared_but_foreign_objects_are() -> None:
    mpu = object()
    given = copy.copy(HUGGING_FACE_STAGE_3) | {
        "tensor_parallel": {"tp": {"mpu": mpu}},
        "bfloat16": None,
        "comms_logger": {"prof_ops": ["all_reduce"]},
        "datastates_ckpt": {"free": {"list": [1]}},
    }
    before = copy.deepcopy({k: v for k, v in given.items() if k != "tensor_parallel"})
    result, _ = schema.normalise(given)
    result["comms_logger"]["prof_ops"].append("x")
    result["datastates_ckpt"]["free"]["list"].append(2)
    result["datastates_ckpt"]["free"]["more"] = 1
    result["zero_optimization"]["offload_param"]["device"] = "none"
    assert {k: v for k, v in given.items() if k != "tensor_parallel"} == before
    assert result["tensor_parallel"]["tp"]["mpu"] is mpu


# --- paths, defaults, auto -----------------------------------------------------------------------


def test_defaults_by_path() -> None:
    assert schema.default_of("gradient_clipping") == 1.0
    assert schema.default_of("zero_optimization.offload_optimizer.buffer_count") == 4
    assert schema.default_of("zero_optimization.offload_optimizer") is None
    assert schema.default_of("optimizer.params.lr", kind="Lion") == 1e-3
    assert schema.default_of("optimizer.params.lr") is NO_DEFAULT  # it depends on the type
    assert schema.default_of("scheduler.params.warmup_max_lr", kind="WarmupDecayLR") == 0.001
    assert schema.default_of("scheduler.params.warmup_num_steps") == 1000
    with pytest.raises(KeyError, match="did you mean gradient_clipping"):
        schema.default_of("gradient_cliping")
    schema.default_of("comms_logger.prof_ops").append("x")
    assert schema.default_of("comms_logger.prof_ops") == []


def test_every_known_path_has_a_default_or_says_that_it_has_none() -> None:
    paths = schema.known_paths()
    assert {"train_batch_size", "optimizer.params.betas", "datastates_ckpt"} <= paths
    assert "zero_optimization" not in paths
    assert not any(path.endswith("curriculum_metrics") for path in paths)
    assert "bfloat16" not in paths
    assert "elasticity" not in paths
    for path in paths:
        schema.default_of(path)


def test_real_auto_values_are_told_from_placeholders() -> None:
    for path in schema.known_paths():
        # DeepSpeed's own default is "auto" exactly where it understands the word.
        assert schema.auto_is_a_value(path) == (schema.default_of(path) == "auto"), path
    assert schema.auto_is_a_value("pipeline.stages")
    assert not schema.auto_is_a_value("gradient_clipping")
    assert not schema.auto_is_a_value("no.such.key")


def _is_plain(path: str) -> bool:
    return not isinstance(find_entries(path, None)[0], Section)


def _typed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _typed(v) for k, v in value.items()}
    return type(value), [_typed(v) for v in value] if isinstance(value, (list, tuple)) else []
