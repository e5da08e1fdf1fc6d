"""``resolve``: who wins for a key and why, what is refused, and that DeepSpeed takes the rest."""

from __future__ import annotations

import base64
import copy
import json
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dstrain.arguments import TrainingArguments
from dstrain.config import Facts, ModelFacts, ResolvedConfig, resolve
from dstrain.config.memory.bucket_rule import BUCKET_ELEMENTS, SMALL_PARAMETER_ELEMENTS
from dstrain.config.resolution.rules import RULES, Binding
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


# --- who wins: the config or the arguments -------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One key that means the same as some arguments.

    Attributes:
        key: dotted path.
        value: a value of the key that differs from its default.
        arguments: the same as arguments.
        other: another value of the key.
        default: the key's value when nothing is given; None when it is then left out.
        base: config that the key needs around it.
        auto: the key's value when nothing is given but "auto"; "same" is the default.
        facts: what is known of the world, if it matters.
    """

    key: str
    value: Any
    arguments: dict[str, Any]
    other: Any
    default: Any
    base: dict[str, Any] = field(default_factory=dict)
    auto: Any = "same"
    facts: Facts | None = None


STAGE_3 = {"zero_optimization": {"stage": 3}}
FP16_STAGE_3 = {**STAGE_3, "fp16": {"enabled": True}}
BF16 = {"bf16": {"enabled": True}}
SUPER = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
WARMUP = {"scheduler": {"type": "WarmupLR"}}
CASES = [
    Case("zero_optimization.stage", 3, {"zero_stage": "3"}, 1, 2),
    Case(
        "zero_optimization.offload_optimizer.device", "cpu", {"offload_optimizer": "cpu"}, "none",
        None,
    ),
    Case(
        "zero_optimization.offload_param.device", "cpu", {"offload_param": "cpu"}, "none", None,
        base=STAGE_3,
    ),
    Case(
        "zero_optimization.sub_group_size", 10**8, {"sub_group_size": 10**8}, 10**7, None,
        base=STAGE_3, auto=10**9,
    ),
    Case(
        "zero_optimization.leaf_module.classes", ["Block"], {"leaf_modules": ["Block"]}, ["Other"],
        None, base=STAGE_3,
    ),
    Case(
        "zero_optimization.offload_optimizer.super_offload", True, {"super_offload": True}, False,
        None, base=SUPER, auto=False,
    ),
    Case("zero_optimization.overlap_comm", True, {"overlap_comm": True}, False, None, auto=False),
    Case(
        "zero_optimization.contiguous_gradients", False, {"contiguous_gradients": False}, True,
        None, auto=True,
    ),
    Case(
        "zero_optimization.round_robin_gradients", True, {"round_robin_gradients": True}, False,
        None, auto=False,
    ),
    Case(
        "communication_data_type", "bf16", {"communication_dtype": "bf16"}, "fp16", None,
        auto="fp32",
    ),
    Case(
        "zero_optimization.zero_hpz_partition_size", 4, {"hpz_partition_size": 4}, 2, None,
        base=STAGE_3, auto=1, facts=Facts(8),
    ),
    *(
        Case(f"zero_optimization.zero_{name}", True, {name: True}, False, None, base=FP16_STAGE_3,
             auto=False)
        for name in ("quantized_weights", "quantized_nontrainable_weights", "quantized_gradients")
    ),
    Case("torch_autocast.enabled", True, {"torch_autocast": True}, False, None, auto=False),
    Case(
        "torch_autocast.dtype", "fp16", {"torch_autocast_dtype": "fp16"}, "float32", "bf16",
        base={"torch_autocast": {"enabled": True}},
    ),
    Case(
        "data_types.grad_accum_dtype", "fp32", {"grad_accum_dtype": "fp32"}, "bf16", None,
        base=BF16, auto="bf16",
    ),
    Case(
        "activation_checkpointing.cpu_checkpointing", True, {"cpu_checkpointing": True}, False,
        None, auto=False,
    ),
    Case("bf16.enabled", True, {"bf16": True}, False, False),
    Case("fp16.enabled", True, {"fp16": True}, False, False),
    Case("gradient_clipping", 0.25, {"max_grad_norm": 0.25}, 0.5, 1.0),
    Case(
        "train_micro_batch_size_per_gpu", 4, {"per_device_train_batch_size": 4}, 2, 8,
    ),
    Case("gradient_accumulation_steps", 4, {"gradient_accumulation_steps": 4}, 2, 1),
    Case("optimizer.type", "SGD", {"optim": "sgd"}, "Adagrad", "AdamW"),
    Case("optimizer.params.lr", 1e-3, {"learning_rate": 1e-3}, 2e-3, 5e-5),
    Case(
        "optimizer.params.betas", [0.8, 0.95], {"adam_beta1": 0.8, "adam_beta2": 0.95}, [0.8, 0.9],
        [0.9, 0.999],
    ),
    Case("optimizer.params.eps", 1e-6, {"adam_epsilon": 1e-6}, 1e-7, 1e-8),
    Case("optimizer.params.weight_decay", 0.1, {"weight_decay": 0.1}, 0.2, 0.0),
    Case("scheduler.params.warmup_max_lr", 1e-3, {"learning_rate": 1e-3}, 2e-3, 5e-5, base=WARMUP),
]  # fmt: skip
every_binding = pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
left_open = pytest.mark.parametrize("open_value", ["missing", "auto"])


def open_config(case: Case, open_value: str) -> dict[str, Any] | None:
    return nested(case.key, "auto", case.base) if open_value == "auto" else case.base


def test_every_binding_has_a_case_here():
    """A new key bound to an argument must not come without its precedence being tested."""
    assert {c.key for c in CASES} == {rule.key for rule in RULES if isinstance(rule, Binding)}


@every_binding
@left_open
def test_open_key_and_untouched_argument_give_the_default(case, open_value):
    got = resolved(open_config(case, open_value), case.facts)
    expected = case.default if open_value == "missing" or case.auto == "same" else case.auto
    assert got.values.get(case.key) == expected
    if expected is not None:
        assert got.provenance[case.key].source in ("default", "derived")


@every_binding
@left_open
def test_open_key_takes_the_changed_argument(case, open_value):
    """Catches an argument that is passed and lost."""
    got = resolved(open_config(case, open_value), case.facts, **case.arguments)
    assert got.values[case.key] == case.value
    reason = got.provenance[case.key]
    assert reason.source in ("argument", "derived")
    assert any(name in reason.detail for name in case.arguments) or reason.source == "derived"


@every_binding
def test_explicit_key_wins_over_an_untouched_argument_which_adopts_it(case):
    """Catches a trainer that goes on with the argument's default beside DeepSpeed's value."""
    got = resolved(nested(case.key, case.value, case.base), case.facts)
    assert got.values[case.key] == case.value
    assert got.provenance[case.key].source == "config"
    for name, value in case.arguments.items():
        assert got.arguments[name] == value
        assert got.adopted[name] == value


@every_binding
def test_explicit_key_equal_to_the_changed_argument_is_no_conflict(case):
    got = resolved(nested(case.key, case.value, case.base), case.facts, **case.arguments)
    assert got.values[case.key] == case.value
    assert got.provenance[case.key].source == "config"
    assert not set(case.arguments) & set(got.adopted)


@every_binding
def test_explicit_key_against_a_changed_argument_is_a_conflict_that_shows_both(case):
    def attempt() -> ResolvedConfig:
        return resolved(nested(case.key, case.other, case.base), case.facts, **case.arguments)

    texts = [text for text in problems_of(attempt) if case.key in text]
    assert texts, "the key must be named"
    assert any(repr(case.other) in text for text in texts)
    assert any(name in text for name in case.arguments for text in texts)


@pytest.mark.parametrize("case", [c for c in CASES if c.default is not None], ids=lambda c: c.key)
def test_explicit_key_equal_to_the_default_stays_explicit(case):
    """A value that happens to be the default was still written by the user."""
    got = resolved(nested(case.key, case.default, case.base), case.facts)
    assert got.values[case.key] == case.default
    assert got.provenance[case.key].source == "config"


def test_untouched_arguments_keep_their_value_beside_a_config():
    got = resolved({"optimizer": {"params": {"lr": 1e-3}}})
    assert got.arguments["weight_decay"] == 0.0
    assert got.adopted == {"learning_rate": 1e-3}


# --- spelling ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "written", "arguments"),
    [
        ("optimizer.params.lr", "1e-3", {"learning_rate": 1e-3}),
        ("optimizer.params.lr", 1e-3, {"learning_rate": "1e-3"}),
        ("gradient_clipping", "0.5", {"max_grad_norm": 0.5}),
        ("gradient_clipping", 2, {"max_grad_norm": 2.0}),
        ("train_micro_batch_size_per_gpu", "4", {"per_device_train_batch_size": 4}),
        ("optimizer.params.betas", (0.8, 0.95), {"adam_beta1": 0.8, "adam_beta2": 0.95}),
        ("optimizer.params.betas", [0.8, "0.95"], {"adam_beta1": 0.8, "adam_beta2": 0.95}),
        ("optimizer.type", "adamw", {"optim": "adamw_torch_fused"}),
        ("optimizer.type", "Adam", {"optim": "adamw_apex_fused"}),
        ("zero_optimization.stage", "3", {"zero_stage": 3}),
    ],
)
def test_the_same_value_in_another_spelling_is_no_conflict(path, written, arguments):
    """ "5e-5" equals 5e-5 and a tuple equals a list: people copy configs from everywhere."""
    resolved(nested(path, written), **arguments)


def test_a_number_written_as_text_reaches_deepspeed_as_a_number():
    config = {"optimizer": {"params": {"lr": "1e-3"}}, "gradient_clipping": "0.5"}
    got = resolved(config)
    assert got.values["optimizer.params.lr"] == 1e-3
    assert got.values["gradient_clipping"] == 0.5
    assert got.arguments["learning_rate"] == 1e-3


def test_different_beta_in_one_of_two_is_a_conflict_of_that_argument():
    config = {"optimizer": {"params": {"betas": [0.8, 0.999]}}}
    (text,) = problems_of(lambda: resolved(config, adam_beta1=0.7))
    assert "adam_beta1=0.7" in text
    assert "adam_beta2" not in text


@pytest.mark.parametrize("betas", [[0.9], [0.9, 0.99, 0.999]])
def test_betas_of_another_length_are_refused(betas):
    assert "betas" in problems_of(lambda: resolved({"optimizer": {"params": {"betas": betas}}}))[0]


@pytest.mark.parametrize(
    "path",
    ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"],
)
def test_null_is_a_missing_key_as_it_is_to_deepspeed(path):
    """Catches a null that reaches ``int(None)``, or counts as a value that the user chose."""
    assert resolved(nested(path, None)).values == resolved().values
    assert resolved(nested(path, None), Facts(4), gradient_accumulation_steps=2).accumulation == 2


# --- conflicts -----------------------------------------------------------------------------------


def test_all_conflicts_come_in_one_error():
    """One start per mistake would cost a queue on a cluster each time."""
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "SGD", "params": {"lr": 1e-3, "madeup": "auto"}},
        "fp16": {"enabled": True},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}},
        "train_batch_size": 17,
    }
    arguments = {
        "per_device_train_batch_size": 2,
        "max_grad_norm": 0.1,
        "optim": "adagrad",
        "learning_rate": 1.0,
    }
    del config["optimizer"]["params"]["madeup"]
    texts = "\n".join(problems_of(lambda: resolved(config, **arguments)))
    for expected in (
        "train_micro_batch_size_per_gpu=4 in your config, but argument per_device_train_batch_size",
        "gradient_clipping=0.5 in your config, but argument max_grad_norm=0.1",
        "optimizer.type='SGD' in your config, but argument optim='adagrad'",
        "optimizer.params.lr=0.001 in your config, but argument learning_rate=1.0",
        "bf16.enabled and fp16.enabled are both true",
        "offload_param.device='cpu' with stage 2",
        "train_batch_size=17",
    ):
        assert expected in texts


def test_all_unknown_keys_come_in_one_error_with_the_nearest_names():
    config = {"gradient_cliping": 1.0, "zero_optimization": {"stag": 2}, "bf16": {"enabled": "x"}}
    texts = problems_of(lambda: resolved(config))
    assert len(texts) == 3
    assert any("gradient_clipping" in text for text in texts)
    assert any("zero_optimization.stage" in text for text in texts)


@pytest.mark.parametrize(("lr", "top"), [(5e-5, 1e-3), (1e-3, 5e-5), (1e-3, 2e-3)])
def test_two_keys_of_one_argument_must_agree_in_any_order(lr, top):
    """Also where one of the two happens to equal the argument's default."""
    config = {
        "optimizer": {"params": {"lr": lr}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": top}},
    }
    (text,) = problems_of(lambda: resolved(config))
    assert "learning_rate" in text
    assert repr(lr) in text
    assert repr(top) in text


def test_two_keys_of_one_argument_that_agree_are_taken():
    config = {
        "optimizer": {"params": {"lr": 1e-3}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "0.001"}},
    }
    assert resolved(config).arguments["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, {}),
        ({"bf16": {"enabled": True}}, {"fp16": True}),
        ({"fp16": {"enabled": True}}, {"bf16": True}),
    ],
)
def test_two_16_bit_formats_are_refused_wherever_each_was_set(config, arguments):
    assert any("one 16-bit format" in t for t in problems_of(lambda: resolved(config, **arguments)))


@pytest.mark.parametrize(
    ("config", "arguments", "what"),
    [
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, {}, "param"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, {}, "optim"),
        ({"zero_optimization": {"stage": 2}}, {"offload_param": "cpu"}, "param"),
        ({"zero_optimization": {"stage": 0}}, {"offload_optimizer": "cpu"}, "optim"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, {"zero_stage": 1}, "param"),
        ("zero2", {"offload_param": "cpu"}, "param"),
        ("zero0", {"offload_optimizer": "cpu"}, "optim"),
    ],
)
def test_offload_below_its_stage_is_refused_wherever_each_was_set(config, arguments, what):
    texts = problems_of(lambda: resolved(config, **arguments))
    assert any(f"offload_{what}" in text and "stage" in text for text in texts)


def test_offloaded_parameters_choose_stage_3_where_none_was_chosen():
    got = resolved(offload_param="cpu")
    assert got.stage == 3
    assert "offload_param" in got.provenance["zero_optimization.stage"].detail


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("micro", "accumulation", "world_size"), [(1, 1, 1), (8, 1, 1), (4, 2, 3), (1, 16, 512)]
)
def test_global_batch_is_the_product(micro, accumulation, world_size):
    got = resolved(
        facts=Facts(world_size=world_size),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
    )
    assert got.micro_batch_size == micro
    assert got.accumulation == accumulation
    assert got.global_batch_size == micro * accumulation * world_size


def test_wrong_train_batch_size_is_refused_with_the_arithmetic():
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    (text,) = problems_of(lambda: resolved({"train_batch_size": 32}, Facts(3), **arguments))
    assert "train_batch_size=32" in text
    assert "micro-batch 4 x accumulation 2 x ranks 3 = 24" in text
    assert "give a multiple of 3 ranks" in text  # no micro-batch and accumulation make 32
    (text,) = problems_of(lambda: resolved({"train_batch_size": 48}, Facts(3), **arguments))
    assert "their product with 3 ranks is 48" in text


def test_right_train_batch_size_is_taken():
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert resolved({"train_batch_size": 24}, Facts(3), **arguments).global_batch_size == 24


def test_train_batch_size_decides_the_accumulation_that_nobody_else_decided():
    got = resolved({"train_batch_size": 64}, Facts(2), per_device_train_batch_size=4)
    assert got.accumulation == 8
    assert got.arguments["gradient_accumulation_steps"] == 8
    reason = got.provenance["gradient_accumulation_steps"]
    assert str(reason) == "train_batch_size 64 / (micro-batch 4 x ranks 2)"
    assert reason.source == "derived"


def test_train_batch_size_and_micro_batch_of_the_config_decide_the_accumulation():
    config = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2}
    assert resolved(config, Facts(2)).accumulation == 16


@pytest.mark.parametrize(
    ("config", "arguments", "arithmetic"),
    [
        ({"train_batch_size": 65}, {}, "accumulation 1 x ranks 2 = 8"),  # no whole number
        ({"train_batch_size": 4}, {}, "accumulation 1 x ranks 2 = 8"),  # less than a micro-step
        (
            {"train_batch_size": 64, "gradient_accumulation_steps": 2},
            {},
            "accumulation 2 x ranks 2 = 16",
        ),
        (
            {"train_batch_size": 64},
            {"gradient_accumulation_steps": 2},
            "accumulation 2 x ranks 2 = 16",
        ),
    ],
)
def test_train_batch_size_that_cannot_be_is_refused(config, arguments, arithmetic):
    """Here 2 ranks with micro-batch 4: catches accumulation rounded, or an argument overruled."""
    arguments = {"per_device_train_batch_size": 4, **arguments}
    (text,) = problems_of(lambda: resolved(config, Facts(2), **arguments))
    assert f"train_batch_size={config['train_batch_size']}" in text
    assert arithmetic in text


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


# --- sizes ---------------------------------------------------------------------------------------

BUCKETS = {
    "reduce_bucket_size": (1, 2, 3),
    "allgather_bucket_size": (1, 2),
    "stage3_prefetch_bucket_size": (3,),
    "stage3_param_persistence_threshold": (3,),
}


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", BUCKETS)
def test_sizes_are_derived_at_the_stages_that_use_them(name, stage):
    got = resolved(facts=Facts(model=MODEL), zero_stage=stage)
    assert (f"zero_optimization.{name}" in got.values) is (stage in BUCKETS[name])


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("model", [None, MODEL])
def test_auto_sizes_resolve_at_every_stage_with_and_without_a_model(stage, model):
    """``explain`` knows no model; a preset of another stage may be edited by hand."""
    config = {"zero_optimization": {"stage": stage, **dict.fromkeys(BUCKETS, "auto")}}
    check_complete(resolved(config, Facts(model=model)))


def test_buckets_hold_no_more_than_the_model_and_100_megabytes():
    """DeepSpeed's default of 5e8 elements is allocated whole, whatever the model's size; a larger
    parameter passes by the bucket."""
    small = resolved(facts=Facts(model=MODEL), zero_stage=3)
    assert small.values["zero_optimization.reduce_bucket_size"] == MODEL.num_trainable + 1
    large = resolved(facts=Facts(model=LARGE_MODEL), zero_stage=3)
    assert large.values["zero_optimization.reduce_bucket_size"] == BUCKET_ELEMENTS
    wide = ModelFacts(10**9, 10**9, largest=10, largest_vector=1)
    values = resolved(facts=Facts(model=wide), zero_stage=3).values
    assert values["zero_optimization.reduce_bucket_size"] == BUCKET_ELEMENTS


@pytest.mark.parametrize(
    ("largest_vector", "expected"), [(7, SMALL_PARAMETER_ELEMENTS), (20_000, 20_000)]
)
def test_norms_and_biases_stay_whole_at_stage_3(largest_vector, expected):
    model = ModelFacts(10**6, 10**6, 10**5, largest_vector)
    values = resolved(facts=Facts(model=model), zero_stage=3).values
    assert values["zero_optimization.stage3_param_persistence_threshold"] == expected


def test_an_explicit_size_stays():
    config = {"zero_optimization": {"reduce_bucket_size": 1e6}}
    got = resolved(config, Facts(model=LARGE_MODEL))
    assert got.values["zero_optimization.reduce_bucket_size"] == 1_000_000


def test_model_facts_of_shapes():
    facts = ModelFacts.of_shapes([((4, 3), True), ((5,), True), ((2, 3, 4), False), ((), True)])
    assert facts == ModelFacts(12 + 5 + 24 + 1, 12 + 5 + 1, largest=24, largest_vector=5)


# --- where the config comes from -----------------------------------------------------------------


def test_json_text_path_and_dict_of_one_config_resolve_alike(tmp_path):
    config = {"gradient_clipping": 0.5, "zero_optimization": {"stage": 1}}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config))
    text = json.dumps(config)
    in_base64 = base64.urlsafe_b64encode(text.encode()).decode()
    forms = [config, text, f"  \n{text}", in_base64, str(file), file]
    assert {json.dumps(dict(resolved(form).values)) for form in forms} == {
        json.dumps(dict(resolved(config).values))
    }
    assert str(resolved(str(file)).provenance["gradient_clipping"]) == "your config (ds.json)"


def test_a_path_may_begin_with_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 0.5}')
    assert resolved("~/ds.json").values["gradient_clipping"] == 0.5


@pytest.mark.parametrize("as_file", [True, False])
def test_keys_that_stand_twice_are_refused_at_every_depth(tmp_path, as_file):
    """JSON parsers keep the last without a word."""
    text = '{"bf16": {"enabled": true, "enabled": false}, "gradient_clipping": 1,\n"bf16": {}}'
    (tmp_path / "ds.json").write_text(text)
    texts = problems_of(lambda: resolved(str(tmp_path / "ds.json") if as_file else text))
    assert len(texts) == 2
    assert "'enabled' (values True and False)" in texts[0]
    assert "'bf16'" in texts[1]


def test_json_that_does_not_parse_is_refused_with_line_and_column():
    (text,) = problems_of(lambda: resolved('{"bf16": {"enabled": true},\n "fp16": }'))
    assert "not valid JSON" in text
    assert "line 2, column 10" in text


@pytest.mark.parametrize(
    ("content", "kind"), [("[1, 2]", "list"), ('"zero2"', "str"), ("1", "int")]
)
def test_a_file_without_an_object_is_refused(tmp_path, content, kind):
    file = tmp_path / "ds.json"
    file.write_text(content)
    (text,) = problems_of(lambda: resolved(str(file)))
    assert f"a JSON {kind}" in text
    assert "expected an object {...}" in text


def test_a_file_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "ds.json"
    file.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in problems_of(lambda: resolved(str(file)))[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zero_3", "did you mean 'zero3'"),
        ("zero2offload", "did you mean 'zero2_offload'"),
        ("/nowhere/ds.json", "neither a file nor a preset"),
        ("x" * 5000, "neither a file nor a preset"),
        ("", "neither a file nor a preset"),
    ],
    ids=["zero_3", "zero2offload", "no such file", "very long", "empty"],
)
def test_an_unknown_preset_or_path_is_refused_with_the_presets(name, expected):
    (text,) = problems_of(lambda: resolved(name))
    assert expected in text
    assert "zero2_offload" in text, "the presets are listed"


def test_a_folder_does_not_hide_the_preset_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero1").mkdir()
    assert resolved("zero1").stage == 1


# --- any arguments, any config -------------------------------------------------------------------


@pytest.fixture(scope="module")
def deepspeed_config_module() -> Any:
    """Give DeepSpeed's own reader of configs, on a machine with or without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        from deepspeed.runtime import config

    return config


@pytest.fixture(scope="module")
def accepted_by_deepspeed(deepspeed_config_module) -> Callable[[ResolvedConfig], Any]:
    """Read a resolved config with DeepSpeed's own reader, as in a group of that many ranks."""

    def read(got: ResolvedConfig) -> Any:
        ranks = types.SimpleNamespace(
            get_rank=lambda: 0, get_world_size=lambda: got.facts.world_size
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deepspeed_config_module, "dist", ranks)
            return deepspeed_config_module.DeepSpeedConfig(got.to_deepspeed())

    return read


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
