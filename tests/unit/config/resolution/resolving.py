"""Arguments and configs resolved in one call, for the tests of resolution."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import strategies as st

from dstrain.arguments import TrainingArguments
from dstrain.config import Facts, ModelFacts, ResolvedConfig, resolve
from dstrain.core.errors import ConfigError

DEFAULTS = TrainingArguments()


ALWAYS_WRITTEN = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16.enabled",
    "fp16.enabled",
    "zero_optimization.stage",
    "optimizer.type",
    "optimizer.params.lr",
    "optimizer.params.weight_decay",
}


MODEL = ModelFacts(num_parameters=7_000_001, num_trainable=5_000_001, largest=99, largest_vector=7)


LARGE_MODEL = ModelFacts(10**9, 10**9, largest=10**8, largest_vector=20_000)


def resolved(
    config: Mapping[str, Any] | str | None = None, facts: Facts | None = None, **arguments: Any
) -> ResolvedConfig:
    """Resolve a config with these arguments, by default for one rank."""
    return resolve(TrainingArguments(deepspeed=config, **arguments), facts or Facts())


def nested(path: str, value: Any, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a config with ``value`` at a dotted path, on top of a copy of ``base``."""
    config: dict[str, Any] = copy.deepcopy(dict(base or {}))
    *parents, last = path.split(".")
    node = config
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    return config


def problems_of(action: Callable[[], Any]) -> list[str]:
    """Return the problems, as text, of the one ConfigError that an action raises."""
    with pytest.raises(ConfigError) as caught:
        action()
    return [str(problem) for problem in caught.value.problems]


def check_complete(got: ResolvedConfig) -> None:
    assert "auto" not in map(str, got.values.values())
    assert set(got.provenance) == set(got.values)
    assert all(str(reason) for reason in got.provenance.values())
    assert {r.source for r in got.provenance.values()} <= {
        "config", "argument", "derived", "default",
    }  # fmt: skip
    assert set(got.values) == set(dotted(got.to_deepspeed()))


def dotted(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for key, value in config.items():
        inside = dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else None
        paths += [f"{prefix}{key}"] if inside is None else inside
    return paths


# argument -> its values, the key that means the same, how a value reads there
SPACE: dict[str, tuple[st.SearchStrategy[Any], str, Callable[[Any], Any]]] = {
    "per_device_train_batch_size": (
        st.integers(1, 16), "train_micro_batch_size_per_gpu", lambda v: v
    ),
    "gradient_accumulation_steps": (
        st.integers(1, 8), "gradient_accumulation_steps", lambda v: v
    ),
    "learning_rate": (st.sampled_from([0.0, 1e-5, 5e-5, 1e-3]), "optimizer.params.lr", str),
    "weight_decay": (st.sampled_from([0.0, 0.1]), "optimizer.params.weight_decay", float),
    "adam_epsilon": (st.sampled_from([1e-8, 1e-6]), "optimizer.params.eps", float),
    "max_grad_norm": (st.sampled_from([0, 0.25, 1.0]), "gradient_clipping", float),
    "bf16": (st.booleans(), "bf16.enabled", bool),
    "fp16": (st.booleans(), "fp16.enabled", bool),
    "zero_stage": (
        st.sampled_from(["auto", "0", "1", "2", "3"]), "zero_optimization.stage",
        lambda v: v if v == "auto" else int(v),
    ),
    "offload_optimizer": (
        st.sampled_from(["none", "cpu"]), "zero_optimization.offload_optimizer.device", str
    ),
    "offload_param": (
        st.sampled_from(["none", "cpu"]), "zero_optimization.offload_param.device", str
    ),
    "optim": (
        st.sampled_from(["adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "sgd", "adagrad"]),
        "optimizer.type",
        lambda v: "AdamW" if v.startswith("adamw") else v,
    ),
}  # fmt: skip


FREE_KEYS: dict[str, st.SearchStrategy[Any]] = {
    "train_batch_size": st.sampled_from(["auto", None, 8, 16, 64, 192]),
    "optimizer.params.betas": st.sampled_from(["auto", [0.9, 0.95], (0.8, "0.9")]),
    "zero_optimization.reduce_bucket_size": st.sampled_from(["auto", 1e6, "1e6"]),
    "zero_optimization.stage3_prefetch_bucket_size": st.just("auto"),
    "zero_optimization.offload_optimizer.pin_memory": st.sampled_from(["auto", True]),
    "fp16.loss_scale": st.sampled_from(["auto", 0, 128]),
    "fp16.initial_scale_power": st.just("auto"),
    "wall_clock_breakdown": st.booleans(),
}


@st.composite
def situations(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], Facts]:
    """Draw arguments, a config over a random subset of keys, and facts.

    A key repeats its argument more often than not, or hardly any situation would resolve.
    """
    names = draw(st.sets(st.sampled_from(sorted(SPACE))))
    arguments = {name: draw(SPACE[name][0]) for name in sorted(names)}
    config: dict[str, Any] = {}
    for name in sorted(draw(st.sets(st.sampled_from(sorted(SPACE)), max_size=6))):
        values, path, as_key = SPACE[name]
        kind = draw(st.sampled_from(["auto", "same", "same", "any"]))
        value = arguments.get(name) if kind == "same" else draw(values)
        if value is not None:
            config = nested(path, "auto" if kind == "auto" else as_key(value), config)
    for path in sorted(draw(st.sets(st.sampled_from(sorted(FREE_KEYS)), max_size=4))):
        config = nested(path, draw(FREE_KEYS[path]), config)
    facts = Facts(
        world_size=draw(st.sampled_from([1, 2, 3, 8, 64])),
        device=draw(st.sampled_from(["cuda", "cpu"])),
        num_training_steps=draw(st.sampled_from([None, 100])),
        model=draw(st.sampled_from([None, MODEL, LARGE_MODEL])),
    )
    return arguments, config, facts
