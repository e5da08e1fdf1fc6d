"""Blocks that the installed DeepSpeed reads without a model have the keys that it asks for."""

from __future__ import annotations

import enum
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from dstrain.config import schema
from dstrain.config.schema.check import walk
from dstrain.config.schema.entry import NO_DEFAULT, Key, Refused, Section
from dstrain.config.schema.keys import CONFIG
from tests.unit.config.schema.paths import all_names, same, section_at


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
        section = CONFIG if path == "" else section_at(path)
        assert set(spy.asked) == set(section.keys) - READ_LATER.get(path, set()), path


def test_defaults_that_deepspeed_asks_with(spies: dict[str, _Spy]) -> None:
    compared = 0
    for path, spy in spies.items():
        section = CONFIG if path == "" else section_at(path)
        for name, default in spy.asked.items():
            entry = section.keys.get(name)
            if isinstance(entry, Key) and NO_DEFAULT not in (default, entry.default):
                compared += 1
                assert same(entry.default, default), f"{path}.{name}"
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
    keys = section_at("pipeline").keys
    assert set(keys) == set(defaults) | read
    for name, default in defaults.items():
        assert same(schema.default_of(f"pipeline.{name}"), default), name


def test_partition_config_keys_are_those_of_its_parser(deepspeed: Any) -> None:
    from deepspeed.module_inject import autotp_config

    source = inspect.getsource(autotp_config.AutoTPConfig.from_dict)
    section = section_at("tensor_parallel.partition_config")
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
            assert same(key.default, _plain(getattr(values, name))), name


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
        assert same(schema.default_of(path), default), path


def test_removed_keys_are_those_that_deepspeed_rejects(deepspeed: Any) -> None:
    from deepspeed.runtime import config

    def refused(section: Section) -> set[str]:
        return {name for name, entry in section.keys.items() if isinstance(entry, Refused)}

    zero = section_at("zero_optimization")
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
    assert keys - all_names() == set()


def test_data_pipeline_constants_are_keys_choices_or_state(deepspeed: Any) -> None:
    from deepspeed.runtime.data_pipeline import constants

    values = {v for n, v in vars(constants).items() if n.isupper() and isinstance(v, str)}
    section = section_at("data_efficiency")
    keys = {name for _, name, _ in walk(section)} | {"data_efficiency"}
    assert values - keys == CHOICES_AND_STATE
    # Written out as strings where DeepSpeed reads them, not as constants: none.
    assert keys - values == set()


def test_model_info_keys(deepspeed: Any) -> None:
    from deepspeed.autotuning.constants import MODEL_INFO_KEY_DEFAULT_DICT

    keys = section_at("autotuning.model_info").keys
    assert {n: schema.default_of(f"autotuning.model_info.{n}") for n in keys} == (
        MODEL_INFO_KEY_DEFAULT_DICT
    )


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value
