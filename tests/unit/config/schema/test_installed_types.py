"""Types of optimizers and schedules, and choices, are those of the installed libraries."""

from __future__ import annotations

import ast
import copy
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from dstrain.config import schema
from dstrain.config.schema.check import find_entries
from dstrain.config.schema.entry import NO_DEFAULT, Key
from dstrain.config.schema.keys import CONFIG
from dstrain.config.schema.optimizer_keys import (
    DEEPSPEED_OPTIMIZERS,
    DEEPSPEED_SCHEDULERS,
    OPTIMIZER_PARAMS,
    SCHEDULER_PARAMS,
    TORCH_OPTIMIZERS,
    TORCH_SCHEDULERS,
)
from tests.unit.config.schema.paths import merge, nest, same


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
                assert same(ours, default), f"{kind}.{name}"


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
            assert same(ours, ast.literal_eval(default)), name


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
            assert same(ours, default), f"{kind}.{name}"


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
        (key,) = find_entries(path, None)
        assert isinstance(key, Key)
        ours = {str(c).lower() for c in (*key.choices, *key.any_case)}
        assert ours == {str(c).lower() for c in choices}, path


def test_expert_parallel_choices_are_those_of_its_validator(deepspeed: Any) -> None:
    from deepspeed.module_inject import auto_ep_config

    source = inspect.getsource(auto_ep_config.validate_autoep_config)
    lists = dict(re.findall(r"valid_(\w+) = (\(.*\))", source))
    assert len(lists) == 6
    for name, text in lists.items():
        (key,) = find_entries(f"expert_parallel.{name}", None)
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
            config = nest(path, sample)
            if schema.check(config):
                continue
            if sample == "auto" and not schema.auto_is_a_value(path):
                continue  # for the resolver
            config, _ = schema.normalise(config)
            failures = []
            for base in bases:
                whole = merge({"train_batch_size": 1}, merge(base, config))
                try:
                    DeepSpeedConfig(copy.deepcopy(whole))
                except Exception as error:  # any refusal counts
                    failures.append(f"{type(error).__name__}: {error}")
            assert len(failures) < len(bases), f"{path} = {sample!r}: {failures[0]}"
