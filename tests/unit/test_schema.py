"""The schema finds what is wrong in a DeepSpeed config, and knows what the installed one knows."""

from __future__ import annotations

import ast
import copy
import enum
import inspect
import json
import math
import os
import re
import types
import typing
from pathlib import Path
from typing import Any

import pytest

from dstrain.config import schema
from dstrain.config.schema.check import _find, _walk
from dstrain.config.schema.keys import (
    CONFIG,
    DEEPSPEED_OPTIMIZERS,
    DEEPSPEED_SCHEDULERS,
    DEEPSPEED_VERSION,
    NO_DEFAULT,
    NONE,
    OPTIMIZER_PARAMS,
    SCHEDULER_PARAMS,
    TORCH_OPTIMIZERS,
    TORCH_SCHEDULERS,
    Alias,
    Key,
    Refused,
    Section,
)

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
    presets = list((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
    if not presets:
        pytest.skip("no presets yet")
    for path in presets:
        assert schema.check(json.loads(path.read_text())) == [], path.name


def test_auto_is_accepted_for_every_single_value() -> None:
    for path in schema.known_paths():
        if _is_plain(path):
            assert schema.check(_nest(path, "auto")) == [], path


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


# --- the contract with the installed DeepSpeed ---------------------------------------------------

LIMITS = {"ge": "minimum", "gt": "above", "le": "maximum", "lt": "below"}
NOT_IN_A_CONFIG_FILE = {"inference"}  # deepspeed/inference has configs of its own


@pytest.fixture(scope="module")
def deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    module = pytest.importorskip("deepspeed")
    if module.__version__.split("+")[0] != DEEPSPEED_VERSION:
        pytest.fail(f"schema_keys.py is written for {DEEPSPEED_VERSION}, not {module.__version__}")
    return module


@pytest.fixture(scope="module")
def models(deepspeed: Any) -> dict[str, Any]:
    """Give DeepSpeed's pydantic models by the section that they describe, nested ones included."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    found: dict[str, Any] = {}

    def add(path: str, model: Any) -> None:
        found[path] = model
        for name, info in model.model_fields.items():
            for kind in _parts(info.annotation):
                if hasattr(kind, "model_fields"):
                    add(f"{path}.{info.alias or name}".lstrip("."), kind)

    for path, model in {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        "tensor_parallel": TPTrainingConfig,
        "compile": CompileConfig,
        "comms_logger": CommsLoggerConfig,
        "hybrid_engine": HybridEngineConfig,
        "weight_quantization": WeightQuantConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
        "": DeepSpeedMonitorConfig,
    }.items():
        add(path, model)
    return found


def test_every_pydantic_model_is_compared(deepspeed: Any, models: dict[str, Any]) -> None:
    root = Path(deepspeed.__file__).parent
    declared = set()
    for file in root.rglob("*.py"):
        if file.relative_to(root).parts[0] not in NOT_IN_A_CONFIG_FILE:
            text = file.read_text(encoding="utf-8")
            declared |= set(re.findall(r"^class (\w+)\(DeepSpeedConfigModel\)", text, re.M))
    # WeightQuantConfig lives with inference.
    assert declared == {model.__name__ for model in models.values()} - {"WeightQuantConfig"}


def test_model_fields_are_the_keys_and_the_other_way_round(models: dict[str, Any]) -> None:
    for path, model in models.items():
        if path == "":
            continue
        spellings = set()
        for name, info in model.model_fields.items():
            spellings |= {name, info.alias or name}
        removed = {n for n, e in _section(path).keys.items() if isinstance(e, Refused)}
        assert set(_section(path).keys) - removed == spellings - removed, path
        # What is refused is either gone, or one of these, which DeepSpeed has without a use.
        assert removed & spellings <= {"cpu_offload_use_pin_memory", "steps_per_epoch"}


def test_monitor_blocks_are_the_models(models: dict[str, Any]) -> None:
    assert set(models[""].model_fields) == {"tensorboard", "wandb", "csv_monitor", "comet"}
    assert set(models[""].model_fields) <= set(CONFIG.keys)


def test_deprecated_fields_are_aliases_to_their_replacement(models: dict[str, Any]) -> None:
    seen = 0
    for path, model in models.items():
        for name, info in model.model_fields.items():
            extra = info.json_schema_extra or {}
            entry = CONFIG.keys[name] if path == "" else _section(path).keys[name]
            if extra.get("deprecated"):
                seen += 1
                if not isinstance(entry, Refused):
                    assert isinstance(entry, Alias)
                    assert entry.to.endswith(extra["new_param"])
            elif info.alias and info.alias != name:
                assert entry == Alias(f"{path}.{info.alias}", "internal")
    assert seen == 4


def test_model_defaults_types_choices_and_limits(models: dict[str, Any]) -> None:
    for path, model in models.items():
        for name, info in model.model_fields.items():
            entry = CONFIG.keys[name] if path == "" else _section(path).keys[info.alias or name]
            where = f"{path}.{name}"
            parts = _parts(info.annotation)
            if isinstance(entry, Section):
                assert dict in parts or any(hasattr(p, "model_fields") for p in parts), where
                assert entry.nullable == (NONE in parts) or name == "leaf_module", where
            if not isinstance(entry, Key):
                continue
            default = info.get_default(call_default_factory=True)
            if object in entry.types and NONE not in entry.types:
                assert entry.default is NO_DEFAULT  # a torch.dtype, which no JSON holds
            else:
                assert _same(entry.default, _plain(default)), where
            assert set(entry.types) == _expected_types(parts, entry), where
            choices = _choices(parts)
            if choices and list not in entry.types:
                assert set(entry.choices) == choices, where
            for limit in info.metadata:
                for sign, ours in LIMITS.items():
                    if hasattr(limit, sign):
                        assert getattr(entry, ours) == getattr(limit, sign), where


class _Spy(dict):
    """A config that remembers which keys were asked for, and the defaults they were asked with."""

    def __init__(self, path: str = "", **blocks: Any) -> None:
        super().__init__()
        self.asked: dict[str, Any] = {}
        self.path = path
        for name, block in blocks.items():
            self[name] = block

    def __copy__(self) -> _Spy:
        return self

    def get(self, name: str, default: Any = None) -> Any:
        self.asked[name] = default
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.asked.setdefault(name, NO_DEFAULT)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.asked.setdefault(str(name), NO_DEFAULT)
        return super().__contains__(name)

    def keys(self) -> Any:
        spy = self

        class Keys:
            def __contains__(self, name: object) -> bool:
                return name in spy

            def __iter__(self) -> Any:
                return iter(dict(spy))

        return Keys()


@pytest.fixture(scope="module")
def spies(deepspeed: Any) -> dict[str, _Spy]:
    """Give the blocks that DeepSpeed reads without a model, which record what it reads."""
    from deepspeed.runtime.config import DeepSpeedConfig

    writer, parallel = _Spy("checkpoint.writer"), _Spy("checkpoint.parallel_write")
    curriculum = _Spy("data_efficiency.data_sampling.curriculum_learning")
    batching = _Spy("data_efficiency.data_sampling.dynamic_batching")
    sampling = _Spy(
        "data_efficiency.data_sampling", curriculum_learning=curriculum, dynamic_batching=batching
    )
    ltd = _Spy("data_efficiency.data_routing.random_ltd")
    routing = _Spy("data_efficiency.data_routing", random_ltd=ltd)
    info = _Spy("autotuning.model_info")
    blocks = {
        "optimizer": _Spy("optimizer", type="AdamW", params={}),
        "scheduler": _Spy("scheduler", type="WarmupLR", params={}),
        "torch_autocast": _Spy("torch_autocast", lower_precision_safe_modules=[], dtype="bf16"),
        "data_types": _Spy("data_types"),
        "activation_checkpointing": _Spy("activation_checkpointing"),
        "aio": _Spy("aio"),
        "checkpoint": _Spy("checkpoint", writer=writer, parallel_write=parallel),
        "expert_parallel": _Spy("expert_parallel", enabled=False),
        "flops_profiler": _Spy("flops_profiler"),
        "autotuning": _Spy("autotuning", model_info=info),
        "data_efficiency": _Spy("data_efficiency", data_sampling=sampling, data_routing=routing),
        "timers": _Spy("timers"),
    }
    root = _Spy("", train_batch_size=1, **blocks)
    DeepSpeedConfig(root)
    old_form = _Spy("", train_batch_size=1, zero_optimization=True)
    DeepSpeedConfig(old_form)
    root.asked |= old_form.asked
    every = (root, *blocks.values(), writer, parallel, curriculum, batching, sampling, ltd, routing)
    return {spy.path: spy for spy in (*every, info)}


# Read later, from the resulting object, in the course of a run: by the constants' test below.
READ_LATER = {
    "data_efficiency.data_sampling.curriculum_learning": {
        "data_cluster_path", "curriculum_metrics",
    },
    "data_efficiency.data_sampling.dynamic_batching": {"metrics_path", "max_tokens"},
    "data_efficiency.data_routing.random_ltd": {
        "total_layer_num", "random_ltd_layer_num", "random_ltd_layer_id", "model_mask_name",
        "model_type", "hidden_state_order", "micro_batch_size", "global_batch_size",
        "random_ltd_schedule", "layer_token_lr_schedule",
    },
    # See test_top_level_keys_that_are_read_outside_the_config_class.
    "": {"data_parallel_size", "sequence_parallel_size"},
}  # fmt: skip


def test_keys_that_deepspeed_asks_for_are_the_keys(spies: dict[str, _Spy]) -> None:
    for path, spy in spies.items():
        section = CONFIG if path == "" else _section(path)
        assert set(spy.asked) == set(section.keys) - READ_LATER.get(path, set()), path


def test_defaults_that_deepspeed_asks_with(spies: dict[str, _Spy]) -> None:
    compared = 0
    for path, spy in spies.items():
        section = CONFIG if path == "" else _section(path)
        for name, default in spy.asked.items():
            entry = section.keys.get(name)
            if isinstance(entry, Key) and NO_DEFAULT not in (default, entry.default):
                compared += 1
                assert _same(entry.default, default), f"{path}.{name}"
    assert compared > 90


def test_top_level_keys_that_are_read_outside_the_config_class(deepspeed: Any) -> None:
    source = Path(deepspeed.__file__).read_text(encoding="utf-8")
    read = set(re.findall(r'"(\w+)" in config\b', source))
    read |= set(re.findall(r'\bconfig(?:\.get\(|\[)"(\w+)"', source))
    assert read == {"sequence_parallel_size", "data_parallel_size", "tensor_parallel"}
    assert read <= set(CONFIG.keys)


def test_pipeline_keys_are_those_that_the_pipeline_engine_reads(deepspeed: Any) -> None:
    from deepspeed.runtime.config import get_pipeline_config

    defaults = get_pipeline_config({})
    engine = Path(deepspeed.__file__).parent / "runtime/pipe/engine.py"
    pattern = r"_config\.pipeline(?:\.get\(|\[)'(\w+)'"
    read = set(re.findall(pattern, engine.read_text(encoding="utf-8")))
    keys = _section("pipeline").keys
    assert set(keys) == set(defaults) | read
    for name, default in defaults.items():
        assert _same(schema.default_of(f"pipeline.{name}"), default), name


def test_partition_config_keys_are_those_of_its_parser(deepspeed: Any) -> None:
    from deepspeed.module_inject import autotp_config

    source = inspect.getsource(autotp_config.AutoTPConfig.from_dict)
    section = _section("tensor_parallel.partition_config")
    specs = section.keys["layer_specs"]
    assert set(section.keys) == set(re.findall(r'config_dict\.get\("(\w+)"', source))
    assert isinstance(specs, Key)
    assert isinstance(specs.items, Section)
    assert set(specs.items.keys) == set(re.findall(r'spec_dict\.get\("(\w+)"', source))
    parsed = autotp_config.AutoTPConfig.from_dict({"layer_specs": [{}]})
    for keys, values in ((section.keys, parsed), (specs.items.keys, parsed.layer_specs[0])):
        for name in set(keys) - {"layer_specs"}:
            key = keys[name]
            assert isinstance(key, Key)
            assert _same(key.default, _plain(getattr(values, name))), name


def test_defaults_that_deepspeed_takes_without_asking(deepspeed: Any) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    plain = DeepSpeedConfig({"train_batch_size": 1})
    expected = {
        "optimizer.type": plain.optimizer_name,
        "optimizer.legacy_fusion": plain.optimizer_legacy_fusion,
        "scheduler.type": plain.scheduler_name,
        "torch_autocast.enabled": plain.torch_autocast_enabled,
        "torch_autocast.dtype": plain.torch_autocast_dtype,
        "torch_autocast.lower_precision_safe_modules": (
            plain.torch_autocast_lower_precision_safe_modules
        ),
        "expert_parallel.load_balance_coeff": plain.expert_parallel_config.load_balance_coeff,
    }
    for path, default in expected.items():
        assert _same(schema.default_of(path), default), path


def test_removed_keys_are_those_that_deepspeed_rejects(deepspeed: Any) -> None:
    from deepspeed.runtime import config

    def refused(section: Section) -> set[str]:
        return {name for name, entry in section.keys.items() if isinstance(entry, Refused)}

    zero = _section("zero_optimization")
    unused = {"cpu_offload_use_pin_memory"}
    assert refused(CONFIG) == set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert refused(zero) - unused == set(config._REMOVED_ZERO_CONFIG_KEYS)
    # Refused because nothing reads it: it stands in its declaration alone.
    root = Path(deepspeed.__file__).parent
    users = [f.name for f in root.rglob("*.py") if next(iter(unused)) in f.read_text("utf-8")]
    assert users == ["config.py"]


# What runtime/data_pipeline/constants.py holds besides keys: choices, and names of saved state.
CHOICES_AND_STATE = {
    "attention_mask", "batch", "cluster", "consumed_layer_tokens", "consumed_samples",
    "current_difficulties", "current_difficulty", "current_steps", "current_value",
    "curriculum_step", "custom", "data_cluster_current_position", "data_cluster_paths",
    "dataloader", "fixed_discrete", "fixed_linear", "fixed_root", "linear", "np_rng_state",
    "percentile", "sample_idx", "single_cluster", "value",
}  # fmt: skip


def test_constants_with_a_default_are_keys(deepspeed: Any) -> None:
    from deepspeed.runtime import constants

    names = vars(constants)
    keys = {str(names[n.removesuffix("_DEFAULT")]) for n in names
            if n.endswith("_DEFAULT") and n.removesuffix("_DEFAULT") in names}  # fmt: skip
    assert len(keys) > 40
    assert keys - _all_names() == set()


def test_data_pipeline_constants_are_keys_choices_or_state(deepspeed: Any) -> None:
    from deepspeed.runtime.data_pipeline import constants

    values = {v for n, v in vars(constants).items() if n.isupper() and isinstance(v, str)}
    section = _section("data_efficiency")
    keys = {name for _, name, _ in _walk(section)} | {"data_efficiency"}
    assert values - keys == CHOICES_AND_STATE
    # Written out as strings where DeepSpeed reads them, not as constants: none.
    assert keys - values == set()


def test_model_info_keys(deepspeed: Any) -> None:
    from deepspeed.autotuning.constants import MODEL_INFO_KEY_DEFAULT_DICT

    keys = _section("autotuning.model_info").keys
    assert {n: schema.default_of(f"autotuning.model_info.{n}") for n in keys} == (
        MODEL_INFO_KEY_DEFAULT_DICT
    )


def _signature(*functions: Any) -> dict[str, Any]:
    """Return parameters of constructors with their defaults; those of the first win."""
    found: dict[str, Any] = {}
    for function in functions:
        for name, parameter in inspect.signature(function).parameters.items():
            empty = parameter.default is inspect.Parameter.empty
            found.setdefault(name, NO_DEFAULT if empty else parameter.default)
    return {k: v for k, v in found.items() if k not in {"params", "model_params", "optimizer"}}


def test_optimizer_parameters_are_those_of_the_constructors(deepspeed: Any) -> None:
    import torch
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    optim = torch.optim
    by_engine = {"torch_adam": False, "adam_w_mode": True}
    constructors = {
        "adam": (FusedAdam, DeepSpeedCPUAdam, optim.AdamW, optim.Adam),
        "adamw": (FusedAdam, DeepSpeedCPUAdam, optim.AdamW),
        "adagrad": (optim.Adagrad, DeepSpeedCPUAdagrad),
        "lamb": (FusedLamb,),
        "lion": (FusedLion, DeepSpeedCPULion),
        "sgd": (optim.SGD,),
    }
    assert set(OPTIMIZER_PARAMS) == {*constructors, "muon"}
    for kind, functions in constructors.items():
        expected = _signature(*functions) | (by_engine if kind.startswith("adam") else {})
        expected.pop("adamw_mode", None)  # the engine passes it, a second one is a TypeError
        section = OPTIMIZER_PARAMS[kind]
        assert set(section.keys) == set(expected) | {"max_grad_norm"}, kind
        for name, default in expected.items():
            if name != "max_grad_norm":
                ours = schema.default_of(f"optimizer.params.{name}", kind=kind)
                assert _same(ours, default), f"{kind}.{name}"


def test_muon_parameters_are_those_that_the_engine_reads(deepspeed: Any) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    source = inspect.getsource(DeepSpeedEngine)
    popped = set(re.findall(r"optimizer_parameters\.pop\('(\w+)'", source))
    assert popped == {"fp32_optimizer_states", "foreach"}
    keys = {*DeepSpeedEngine._MUON_HALF_KEYS, *DeepSpeedEngine._ADAM_HALF_KEYS, *popped}
    keys |= {"muon_lr", "adam_lr", "torch_adam", "adam_w_mode", "max_grad_norm"}
    assert set(OPTIMIZER_PARAMS["muon"].keys) == keys
    # Read as text: importing the module compiles its kernels.
    module = Path(deepspeed.__file__).parent / "runtime/zero/muon/original_muon.py"
    text = module.read_text(encoding="utf-8")
    methods = re.search(r"^NS_METHODS = (.*)$", text, re.M)
    ours = OPTIMIZER_PARAMS["muon"].keys["ns_method"]
    assert methods is not None
    assert isinstance(ours, Key)
    assert set(ours.choices) == ast.literal_eval(methods[1])
    defaults = dict(re.findall(r'group\["\w+"\] = group\.get\("(\w+)", (.*)\)', text))
    assert set(defaults) == {"lr", "momentum", "weight_decay", "ns_method", "betas", "eps"}
    for name, default in defaults.items():
        if name != "lr":  # each half has its own
            ours = schema.default_of(f"optimizer.params.{name}", kind="Muon")
            assert _same(ours, ast.literal_eval(default)), name


def test_optimizer_and_scheduler_types_are_those_that_the_engine_finds(deepspeed: Any) -> None:
    import torch
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS as THEIRS

    def classes(module: Any, base: type) -> set[str]:
        return {n for n, v in vars(module).items()
                if inspect.isclass(v) and issubclass(v, base) and v is not base
                and not n.startswith("_")}  # fmt: skip

    assert sorted(name.lower() for name in DEEPSPEED_OPTIMIZERS) == sorted(THEIRS)
    torch_names = classes(torch.optim, torch.optim.Optimizer)
    assert set(TORCH_OPTIMIZERS) == {n for n in torch_names if n.lower() not in THEIRS}
    assert set(DEEPSPEED_SCHEDULERS) == set(lr_schedules.VALID_LR_SCHEDULES)
    schedules = torch.optim.lr_scheduler
    assert set(TORCH_SCHEDULERS) == classes(schedules, schedules.LRScheduler)


def test_scheduler_parameters_are_those_of_the_constructors(deepspeed: Any) -> None:
    from deepspeed.runtime import lr_schedules

    assert set(SCHEDULER_PARAMS) == {name.lower() for name in DEEPSPEED_SCHEDULERS}
    for kind in DEEPSPEED_SCHEDULERS:
        expected = _signature(getattr(lr_schedules, kind))
        assert set(SCHEDULER_PARAMS[kind.lower()].keys) == set(expected), kind
        for name, default in expected.items():
            ours = schema.default_of(f"scheduler.params.{name}", kind=kind)
            assert _same(ours, default), f"{kind}.{name}"


def test_choices_of_keys_without_a_model(deepspeed: Any) -> None:
    from deepspeed.module_inject import autotp_config
    from deepspeed.module_inject.auto_ep_presets.registry import PRESET_MODELS
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import DtypeEnum
    from deepspeed.runtime.model_checkpointing import constants as writing
    from deepspeed.utils.logging import log_levels

    presets = inspect.getsource(autotp_config.AutoTPPresets.get_preset)
    dtypes = {name for member in DtypeEnum for name in member._all_values if isinstance(name, str)}
    spec = "tensor_parallel.partition_config.layer_specs[]."
    expected = {
        "gradient_allreduce_op": constants.GRADIENT_ALLREDUCE_OP_SUPPORTED,
        "log_level": log_levels,
        "checkpoint.tag_validation": constants.CHECKPOINT_TAG_VALIDATION_MODES,
        "checkpoint.writer.type": writing.CHECKPOINT_WRITER_TYPES,
        "checkpoint.writer.data_parallel": writing.CHECKPOINT_DATA_PARALLEL_UNITS,
        "expert_parallel.preset_model": PRESET_MODELS,
        "tensor_parallel.preset_model": re.findall(r'"(\w+)": AutoTPPresets', presets),
        spec + "partition_type": [member.value for member in autotp_config.PartitionType],
        "torch_autocast.dtype": dtypes,
        "data_types.grad_accum_dtype": dtypes,
    }
    for path, choices in expected.items():
        (key,) = _find(path, None)
        assert isinstance(key, Key)
        ours = {str(c).lower() for c in (*key.choices, *key.any_case)}
        assert ours == {str(c).lower() for c in choices}, path


def test_expert_parallel_choices_are_those_of_its_validator(deepspeed: Any) -> None:
    from deepspeed.module_inject import auto_ep_config

    source = inspect.getsource(auto_ep_config.validate_autoep_config)
    lists = dict(re.findall(r"valid_(\w+) = (\(.*\))", source))
    assert len(lists) == 6
    for name, text in lists.items():
        (key,) = _find(f"expert_parallel.{name}", None)
        assert isinstance(key, Key)
        ours = {*key.choices, *(["auto"] if key.auto_is_value else [])}
        assert ours == set(ast.literal_eval(text)), name


SAMPLES = [
    None, True, False, 0, 1, 2, 3, 7, -1, 0.5, 1.0, 2.5, 1e9, "5e8", "3", "0.25", "none", "x",
    [], [1], ["a"], "auto",
]  # fmt: skip
# Values that are right by themselves and need another key, or a device, beside them.
NEED_MORE = {
    "aio.use_gds": "asserts a CUDA device",
    "bf16.bf16_optimizer_states": "asserts bf16_master_weights_and_grads",
    "data_efficiency.data_sampling.curriculum_learning.enabled": "asserts curriculum_metrics",
    "data_efficiency.data_sampling.dynamic_batching.enabled": "asserts max_tokens",
    "train_batch_size": "the batch arithmetic",
    "train_micro_batch_size_per_gpu": "the batch arithmetic",
    "gradient_accumulation_steps": "the batch arithmetic",
}


@pytest.mark.parametrize("block", sorted(CONFIG.keys))
def test_what_check_passes_deepspeed_takes(deepspeed: Any, block: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    bases: list[dict[str, Any]] = [{}, *({"zero_optimization": {"stage": s}} for s in (2, 3))]
    for path in schema.known_paths():
        if path.split(".")[0] != block or path in NEED_MORE or "*" in path or "[]" in path:
            continue
        for sample in SAMPLES:
            config = _nest(path, sample)
            if schema.check(config):
                continue
            if sample == "auto" and not schema.auto_is_a_value(path):
                continue  # for the resolver
            config, _ = schema.normalise(config)
            failures = []
            for base in bases:
                whole = _merge({"train_batch_size": 1}, _merge(base, config))
                try:
                    DeepSpeedConfig(copy.deepcopy(whole))
                except Exception as error:  # any refusal counts
                    failures.append(f"{type(error).__name__}: {error}")
            assert len(failures) < len(bases), f"{path} = {sample!r}: {failures[0]}"


# --- helpers -------------------------------------------------------------------------------------


def _nest(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        name = "name" if part == "*" else part.removesuffix("[]")
        value = {name: [value] if part.endswith("[]") else value}
    return value


def _is_plain(path: str) -> bool:
    return not isinstance(_find(path, None)[0], Section)


def _all_names() -> set[str]:
    return {name for _, name, _ in _walk(CONFIG)}


def _merge(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in more.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def _typed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _typed(v) for k, v in value.items()}
    return type(value), [_typed(v) for v in value] if isinstance(value, (list, tuple)) else []


def _section(path: str) -> Section:
    section = CONFIG
    for part in path.split("."):
        found = section.keys[part]
        assert isinstance(found, Section), path
        section = found
    return section


def _parts(annotation: Any) -> list[Any]:
    """List the members of a union, generics reduced to their origin, literals as they are."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [part for arg in typing.get_args(annotation) for part in _parts(arg)]
    origin = typing.get_origin(annotation)
    return [annotation if origin in (None, typing.Literal) else origin]


def _expected_types(parts: list[Any], key: Key) -> set[type]:
    kinds: set[type] = set()
    for part in parts:
        if typing.get_origin(part) is typing.Literal:
            kinds.add(str)
        elif part is Path:
            kinds |= {str, os.PathLike}
        elif inspect.isclass(part) and issubclass(part, enum.Enum):
            kinds.add(int if issubclass(part, int) else str)
        elif part in (bool, int, float, str, NONE, list):
            kinds.add(part)
        else:
            kinds.add(list if part is tuple else object)
    if object in kinds and key.default is None:
        kinds.add(NONE)
    if key.auto_is_value and int in kinds:
        kinds -= {str}  # the string is "auto"
    if key.items and str in key.types:
        kinds.add(str)  # DeepSpeed turns one name into a list
    return kinds


def _choices(parts: list[Any]) -> set[Any]:
    for part in parts:
        if typing.get_origin(part) is typing.Literal:
            return set(typing.get_args(part))
        if inspect.isclass(part) and issubclass(part, enum.Enum):
            return {member.value for member in part}
    return set()


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, bool) or isinstance(theirs, bool):
        return ours is theirs
    if isinstance(ours, list) and isinstance(theirs, (list, tuple)):
        return ours == list(theirs)
    return ours == theirs
