"""What becomes of ``optim`` and of DeepSpeed's own schedules."""

from __future__ import annotations

import pytest

from dstrain.config import Facts
from tests.unit.config.resolution.resolving import (
    check_complete,
    problems_of,
    resolved,
)

# --- optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optim", "kind", "torch_adam", "fused"),
    [
        ("adamw_torch", "AdamW", True, None),
        ("adamw_torch_fused", "AdamW", True, True),
        ("adamw_apex_fused", "AdamW", False, None),
        ("sgd", "SGD", None, None),
        ("adagrad", "Adagrad", None, None),
    ],
)
def test_every_optim_becomes_its_deepspeed_optimizer(optim, kind, torch_adam, fused):
    values = resolved(optim=optim).values
    assert values["optimizer.type"] == kind
    assert values.get("optimizer.params.torch_adam") == torch_adam
    assert values.get("optimizer.params.fused") == fused


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adamw_apex_fused"])
def test_offloaded_adam_is_deepspeeds_cpu_adam(optim):
    """torch's Adam on host memory would be the slow path, and refuses ``fused``."""
    values = resolved(optim=optim, offload_optimizer="cpu").values
    assert values["optimizer.params.torch_adam"] is False
    assert "optimizer.params.fused" not in values


def test_offload_by_the_config_counts_as_offload():
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert resolved(config).values["optimizer.params.torch_adam"] is False


def test_only_adam_gets_the_parameters_of_adam():
    """SGD(betas=...) is a TypeError of torch."""
    config = {"optimizer": {"type": "SGD", "params": {"lr": "auto"}}}
    got = resolved(config, adam_beta1=0.8)
    assert {k for k in got.values if k.startswith("optimizer.params")} == {
        "optimizer.params.lr",
        "optimizer.params.weight_decay",
    }


def test_auto_parameters_of_adam_go_when_the_argument_chose_another_optimizer():
    """The presets write betas as "auto" for everyone."""
    got = resolved("zero2", optim="sgd")
    assert "optimizer.params.betas" not in got.values
    check_complete(got)


@pytest.mark.parametrize(("stage", "asked"), [(0, None), (1, True), (3, True)])
def test_zero_is_told_of_optimizers_it_has_not_tested(stage, asked):
    got = resolved(optim="sgd", zero_stage=stage)
    assert got.values.get("zero_allow_untested_optimizer") == asked
    assert "zero_allow_untested_optimizer" not in resolved(zero_stage=stage).values


def test_pinned_host_memory_is_for_accelerators():
    key = "zero_optimization.offload_optimizer.pin_memory"
    assert resolved(None, Facts(device="cuda"), offload_optimizer="cpu").values[key] is True
    assert resolved(None, Facts(device="cpu"), offload_optimizer="cpu").values[key] is False
    assert key not in resolved().values


# --- schedules of DeepSpeed's own ----------------------------------------------------------------

AUTO_SCHEDULE = {
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": "auto",
            "warmup_num_steps": "auto",
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
        },
    }
}


def test_no_scheduler_section_means_none_of_deepspeeds():
    got = resolved()
    assert not got.has_scheduler
    assert not any(key.startswith("scheduler") for key in got.values)


@pytest.mark.parametrize(
    ("arguments", "warmup"),
    [({}, 1), ({"warmup_steps": 10}, 10), ({"warmup_steps": 0.1}, 20), ({"warmup_ratio": 0.3}, 60)],
)
@pytest.mark.parametrize("config", [AUTO_SCHEDULE, {"scheduler": {"type": "WarmupDecayLR"}}])
def test_schedule_is_filled_from_the_run(config, arguments, warmup):
    """Also where the config leaves the parameters out: DeepSpeed would rise to 1e-3 in 1000 steps.

    A warm-up of no steps is written as 1, the least that DeepSpeed takes.
    """
    got = resolved(config, Facts(num_training_steps=200), learning_rate=2e-4, **arguments)
    assert got.has_scheduler
    assert got.to_deepspeed()["scheduler"]["params"] == {
        "warmup_max_lr": 2e-4,
        "warmup_min_lr": 0,
        "total_num_steps": 200,
        "warmup_num_steps": warmup,
    }


def test_schedule_of_the_users_own_numbers_is_left_alone():
    params = {"total_num_steps": 7, "warmup_num_steps": 3, "warmup_max_lr": 1e-3}
    config = {"scheduler": {"type": "WarmupDecayLR", "params": params}}
    got = resolved(config, Facts(num_training_steps=200))
    assert params.items() <= got.to_deepspeed()["scheduler"]["params"].items()


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr_scheduler_type": "polynomial"},
        {"lr_scheduler_kwargs": {"power": 2}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2}},
    ],
)
def test_a_schedule_in_the_config_does_not_swallow_one_in_the_arguments(arguments):
    """Only one of the two can run; the other must not be lost without a word."""
    texts = problems_of(lambda: resolved({"scheduler": {"type": "WarmupLR"}}, **arguments))
    assert len(texts) == len(arguments)
    for name, text in zip(arguments, texts, strict=True):
        assert "scheduler.type='WarmupLR'" in text
        assert name in text


def test_the_same_schedule_in_config_and_arguments_is_no_conflict():
    resolved({"scheduler": {"type": "WarmupLR"}}, lr_scheduler_type="constant_with_warmup")
    resolved({"scheduler": {"type": "WarmupCosineLR"}}, lr_scheduler_type="cosine")


@pytest.mark.parametrize(
    ("arguments", "conflicts"),
    [
        ({}, []),
        ({"warmup_steps": 20}, []),
        ({"warmup_ratio": 0.1}, []),
        ({"warmup_steps": 30}, ["warmup_steps=30"]),
        ({"warmup_ratio": 0.5}, ["warmup_ratio=0.5"]),
    ],
)
def test_warmup_of_the_config_against_the_arguments(arguments, conflicts):
    """20 of 200 steps in the config."""
    config = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20}}}
    facts = Facts(num_training_steps=200)
    if conflicts:
        texts = problems_of(lambda: resolved(config, facts, **arguments))
        assert [expected in text for expected, text in zip(conflicts, texts, strict=True)] == [True]
    else:
        assert (
            resolved(config, facts, **arguments).values["scheduler.params.warmup_num_steps"] == 20
        )


@pytest.mark.parametrize("kind", ["OneCycle", "LRRangeTest", "WarmupCosineLR", "LambdaLR"])
def test_a_schedule_gets_no_parameter_that_it_does_not_take(kind):
    """OneCycle(warmup_max_lr=...) is a TypeError of DeepSpeed."""
    got = resolved({"scheduler": {"type": kind}}, Facts(num_training_steps=200))
    assert "scheduler.params.warmup_max_lr" not in got.values
    assert resolved({"scheduler": {"type": kind}}, Facts(num_training_steps=200)) == got


def test_unknown_number_of_steps_is_said_and_not_guessed():
    """The Trainer is built before its data is counted, so an open end is no error yet."""
    got = resolved(AUTO_SCHEDULE)
    assert "scheduler.params.total_num_steps" not in got.values
    assert any("total_num_steps" in text and "max_steps" in text for text in got.warnings)
