"""What is written, with a reason for each key; resolving is pure and can be repeated."""

from __future__ import annotations

import copy

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.config import Facts, resolve
from tests.unit.config.resolution.resolving import (
    ALWAYS_WRITTEN,
    MODEL,
    check_complete,
    problems_of,
    resolved,
)

# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        {"gradient_clipping": "auto"},
        {"zero_optimization": {"stage": 0}},
        "zero0",
        "zero3",
    ],
    ids=str,
)
def test_batch_precision_and_clipping_are_always_written(config):
    """DeepSpeed clips at its own default of 1.0 where the key is missing, and guesses batches."""
    got = resolved(config, max_grad_norm=0.25)
    assert set(got.values) >= ALWAYS_WRITTEN
    assert got.values["gradient_clipping"] == 0.25


def test_clipping_that_is_turned_off_is_written_as_zero():
    assert resolved(max_grad_norm=0).values["gradient_clipping"] == 0


def test_every_leaf_has_a_reason_and_nothing_is_left_auto():
    config = {
        "_comment": "not a key",
        "optimizer": {"type": "auto", "params": {"lr": "auto", "betas": "auto"}},
        "zero_optimization": {
            "stage": "auto",
            "offload_optimizer": {"device": "auto", "pin_memory": "auto"},
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
        },
        "fp16": {"enabled": "auto", "loss_scale": "auto", "initial_scale_power": "auto"},
        "wall_clock_breakdown": True,
    }
    check_complete(resolved(config))
    assert "_comment" not in resolved(config).values


def test_a_section_whose_keys_all_fall_away_goes_with_them():
    """Catches an empty section without a reason (it once ended in a KeyError)."""
    config = {"zero_optimization": {"offload_optimizer": {"device": "auto", "pin_memory": "auto"}}}
    got = resolved(config)
    assert got.values == resolved().values
    assert "offload_optimizer" not in got.to_deepspeed()["zero_optimization"]


def test_an_auto_that_no_rule_knows_is_refused_with_its_path():
    (text,) = problems_of(lambda: resolved({"steps_per_print": "auto"}))
    assert 'steps_per_print="auto"' in text
    assert "write a value" in text


def test_keys_that_no_rule_owns_pass_through_untouched():
    config = {"wall_clock_breakdown": True, "flops_profiler": {"enabled": True, "top_modules": 3}}
    got = resolved(config)
    assert got.values["flops_profiler.top_modules"] == 3
    assert got.to_deepspeed()["flops_profiler"] == {"enabled": True, "top_modules": 3}
    assert str(got.provenance["wall_clock_breakdown"]) == "your config"


def test_adopted_value_in_another_key_says_that_it_comes_from_the_config():
    """The reason must not call a value "default of learning_rate" that the config chose."""
    config = {
        "optimizer": {"params": {"lr": 1e-3}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}},
    }
    got = resolved(config)
    assert got.values["scheduler.params.warmup_max_lr"] == 1e-3
    reason = got.provenance["scheduler.params.warmup_max_lr"]
    assert reason.source == "config"
    assert "optimizer.params.lr" in reason.detail


def test_old_spellings_are_read_and_reported():
    got = resolved({"zero_optimization": {"stage": 2, "cpu_offload": True}})
    assert got.values["zero_optimization.offload_optimizer.device"] == "cpu"
    assert got.arguments["offload_optimizer"] == "cpu"
    assert any("cpu_offload" in warning for warning in got.warnings)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({}, "fp32"), ({"bf16": True}, "bf16"), ({"fp16": True}, "fp16")],
)
def test_precision_by_name(arguments, expected):
    assert resolved(**arguments).precision == expected


def test_fp16_brings_dynamic_loss_scaling_and_other_formats_do_not():
    got = resolved(fp16=True)
    assert got.values["fp16.loss_scale"] == 0
    assert got.values["fp16.initial_scale_power"] == 16
    assert not any("loss_scale" in key for key in resolved(bf16=True).values)
    config = {"fp16": {"enabled": True, "loss_scale": 128}}
    assert resolved(config).values["fp16.loss_scale"] == 128


# --- pure and repeatable -------------------------------------------------------------------------

RICH = {
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}},
    "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": "auto"}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}},
}


def test_resolving_changes_neither_the_config_nor_the_arguments():
    given = copy.deepcopy(RICH)
    args = TrainingArguments(deepspeed=given, learning_rate=1e-3)
    before = copy.deepcopy(args.to_dict())
    resolve(args, Facts(num_training_steps=10))
    assert given == RICH
    assert args.to_dict() == before


def test_resolving_twice_gives_the_same():
    args = TrainingArguments(deepspeed=copy.deepcopy(RICH), learning_rate=1e-3)
    facts = Facts(world_size=4, num_training_steps=10, model=MODEL)
    first, second = resolve(args, facts), resolve(args, facts)
    assert first == second
    assert list(first.values) == list(second.values), "the same order too"


def test_resolving_again_sees_what_changed_in_the_arguments():
    """set_* methods and a second train() must take effect."""
    args = TrainingArguments()
    assert resolve(args, Facts()).values["optimizer.params.lr"] == 5e-5
    args.learning_rate = 1e-3
    assert resolve(args, Facts()).values["optimizer.params.lr"] == 1e-3


def test_each_to_deepspeed_is_a_dict_of_its_own():
    """DeepSpeed writes into the dict it is given."""
    got = resolved(copy.deepcopy(RICH), Facts(num_training_steps=10))
    handed_out = got.to_deepspeed()
    handed_out["optimizer"]["params"]["betas"].append(0)
    handed_out["zero_optimization"]["stage"] = 0
    assert got.to_deepspeed()["optimizer"]["params"]["betas"] == [0.9, 0.95]
    assert got.stage == 3


def test_a_later_change_of_the_users_dict_does_not_reach_the_resolved_config():
    given = copy.deepcopy(RICH)
    got = resolved(given, Facts(num_training_steps=10))
    given["optimizer"]["params"]["betas"].append(0)
    assert got.values["optimizer.params.betas"] == [0.9, 0.95]


def test_the_result_is_frozen():
    with pytest.raises(AttributeError):
        resolved().values = {}
