"""Who decides a key: the user's config or an argument, in any spelling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from dstrain.config import Facts, ResolvedConfig
from dstrain.config.resolution.rules import RULES, Binding
from tests.unit.config.resolution.resolving import (
    nested,
    problems_of,
    resolved,
)

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
