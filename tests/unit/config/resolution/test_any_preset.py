"""Whatever a user writes: presets, dicts and JSON text with keys left open at random."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from dstrain.arguments import TrainingArguments
from dstrain.config import Facts, Machine, schema
from dstrain.config.memory.closed_forms import closed_form
from dstrain.config.memory.footprint import GIB
from dstrain.config.resolution.resolve import resolve
from dstrain.config.resolution.rules import RULES
from dstrain.config.resolution.source import preset_folder
from dstrain.core.errors import ConfigError
from tests.unit.config.resolution.resolving import (
    ALWAYS_WRITTEN,
    DEFAULTS,
    check_complete,
    situations,
)
from tests.unit.config.resolution.test_presets import ONLY_CUDA, PRESETS

# Of some keys "auto" is a value that DeepSpeed itself understands: those stay as they are.
PATHS = sorted(
    path for path in schema.known_paths() if "*" not in path and not schema.auto_is_a_value(path)
)
DERIVED = sorted({rule.key for rule in RULES})
SIZES = closed_form(
    {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "vocab_size": 32000}
)
MACHINES = [None, *(Machine(8, size * GIB, 512 * GIB) for size in (4, 16, 80))]


def on_top(config: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the values of ``config``."""
    merged = copy.deepcopy(dict(base))
    for key, value in config.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = on_top(value, old) if both else value
    return merged


def put(config: dict[str, Any], path: str, value: Any) -> None:
    """Set a key that is not there yet, unless something else than a section is in its way."""
    *parents, last = path.split(".")
    node: Any = config
    for part in parents:
        node = node.setdefault(part, {}) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.setdefault(last, value)


@st.composite
def anything(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], Facts]:
    """Draw arguments; a config on a preset or nothing, with random keys at "auto" and other
    ones at DeepSpeed's default; facts."""
    arguments, config, facts = draw(situations())
    preset = draw(st.sampled_from([None, *PRESETS]))
    if preset is not None:
        config = on_top(config, json.loads((preset_folder() / f"{preset}.json").read_text()))
    for path in sorted(draw(st.sets(st.sampled_from(DERIVED), max_size=4))):
        put(config, path, "auto")
    for path in sorted(draw(st.sets(st.sampled_from(PATHS), max_size=2))):
        default = schema.default_of(path)
        stated = isinstance(default, bool | int | float | str) and draw(st.integers(0, 3))
        put(config, path, default if stated else "auto")
    machine = draw(st.sampled_from(MACHINES))
    if machine is not None and SIZES is not None:
        facts = dataclasses.replace(facts, machine=machine, sizes=SIZES, model=SIZES.facts)
    return arguments, config, facts


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(situation=anything(), as_text=st.booleans())
def test_any_config_is_complete_or_refused_with_reasons(accepted_by_deepspeed, situation, as_text):
    """No "auto" remains, the batch adds up, every leaf has a reason, twice gives the same, and
    DeepSpeed takes it; or the error says what is wrong, and nothing else is ever raised."""
    arguments, config, facts = situation
    written = json.dumps(config) if as_text else copy.deepcopy(config)
    try:
        args = TrainingArguments(deepspeed=written, **arguments)
    except ConfigError:
        assume(False)
    refusal = None
    try:
        got = resolve(args, facts)
    except ConfigError as error:
        refusal = error
    event("refused" if refusal else "resolved")
    if refusal is not None:
        assert refusal.problems
        assert all(problem.what and problem.why for problem in refusal.problems)
        return
    check_complete(got)
    assert set(got.values) >= ALWAYS_WRITTEN
    assert resolve(args, facts) == got
    assert got.micro_batch_size * got.accumulation * facts.world_size == got.global_batch_size
    for name, value in arguments.items():
        if value not in (getattr(DEFAULTS, name), "auto"):
            assert got.arguments[name] == value, "a changed argument was overruled"
    read = accepted_by_deepspeed(got)
    assert read.train_batch_size == got.global_batch_size
    assert int(read.zero_optimization_stage) == got.stage


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(preset=st.sampled_from(PRESETS), situation=situations())
def test_any_preset_by_name_goes_with_any_arguments_that_do_not_contradict_it(
    accepted_by_deepspeed, preset, situation
):
    """A preset fixes nothing but ZeRO, so only arguments about ZeRO can be refused with it."""
    arguments, _, facts = situation
    zero = ("zero_stage", "offload_optimizer", "offload_param")
    arguments = {name: value for name, value in arguments.items() if name not in zero}
    if "nvme" in preset:
        arguments["nvme_path"] = "/local"
    if preset in ONLY_CUDA:
        facts = dataclasses.replace(facts, device="cuda")
        arguments |= {"bf16": True, "fp16": False}
    try:
        args = TrainingArguments(deepspeed=preset, **arguments)
    except ConfigError:
        assume(False)
    got = resolve(args, facts)
    check_complete(got)
    assert accepted_by_deepspeed(got).train_batch_size == got.global_batch_size
