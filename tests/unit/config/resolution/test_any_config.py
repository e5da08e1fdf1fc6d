"""Whatever a user writes is refused with reasons, or complete and accepted by DeepSpeed."""

from __future__ import annotations

import copy

from hypothesis import assume, given, settings

from dstrain.arguments import TrainingArguments
from dstrain.config import resolve
from dstrain.core.errors import ConfigError
from tests.unit.config.resolution.resolving import (
    ALWAYS_WRITTEN,
    DEFAULTS,
    check_complete,
    situations,
)


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(situation=situations())
def test_any_config_is_refused_with_reasons_or_complete_and_accepted_by_deepspeed(
    accepted_by_deepspeed, situation
):
    """Whatever is combined: never a KeyError, never a half-filled config, never a lost value."""
    arguments, config, facts = situation
    try:
        args = TrainingArguments(deepspeed=copy.deepcopy(config), **arguments)
    except ConfigError:
        assume(False)
    refusal = None
    try:
        got = resolve(args, facts)
    except ConfigError as error:
        refusal = error
    if refusal is not None:
        assert refusal.problems
        assert all(problem.what and problem.why for problem in refusal.problems)
        assert config, "arguments that were accepted need no config to be resolved"
        return
    check_complete(got)
    assert set(got.values) >= ALWAYS_WRITTEN
    assert args.deepspeed == config, "the user's dict was changed"
    assert resolve(args, facts) == got
    assert got.micro_batch_size * got.accumulation * facts.world_size == got.global_batch_size
    for name, value in arguments.items():
        if value != getattr(DEFAULTS, name):
            assert got.arguments[name] == value, "a changed argument was overruled"
    read = accepted_by_deepspeed(got)
    assert read.train_batch_size == got.global_batch_size
    assert read.gradient_clipping == got.arguments["max_grad_norm"]
    assert int(read.zero_optimization_stage) == got.stage
    assert bool(read.bfloat16_config.enabled) is (got.precision == "bf16")
    assert bool(read.float16_config.enabled) is (got.precision == "fp16")
