"""One error for all mistakes in the arguments."""

from __future__ import annotations

from typing import Any

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.core.errors import ConfigError

# --- refusals ------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"per_device_train_batch_size": 0}, "at least 1"),
    ({"per_device_eval_batch_size": -1}, "at least 1"),
    ({"gradient_accumulation_steps": 0}, "at least 1"),
    ({"num_train_epochs": 0}, "no optimizer step"),
    ({"dataloader_num_workers": -1}, "0 or more"),
    ({"dataloader_prefetch_factor": 2}, "dataloader_num_workers=0"),
    ({"dataloader_prefetch_factor": 0, "dataloader_num_workers": 1}, "at least 1"),
    ({"dataloader_persistent_workers": True}, "dataloader_num_workers=0"),
    ({"learning_rate": -1e-5}, "0 or more"),
    ({"weight_decay": -0.1}, "0 or more"),
    ({"adam_beta1": 1.0}, "0 <= beta < 1"),
    ({"adam_beta2": -0.1}, "0 <= beta < 1"),
    ({"adam_epsilon": -1e-8}, "0 or more"),
    ({"max_grad_norm": -1}, "0 or more"),
    ({"warmup_ratio": 1.1}, "between 0 and 1"),
    ({"warmup_steps": -1}, "whole number"),
    ({"warmup_steps": 1.5}, "whole number"),
    ({"fp16": True, "bf16": True}, "one 16-bit format"),
    ({"offload_param": "cpu", "zero_stage": 2}, "only stage 3"),
    ({"offload_optimizer": "cpu", "zero_stage": 0}, "stage 0"),
    ({"eval_steps": -1, "eval_strategy": "steps"}, "positive number of steps"),
    ({"eval_steps": 2.5, "eval_strategy": "steps"}, "whole number"),
    ({"logging_steps": 0}, "positive number of steps"),
    ({"logging_steps": 2.5}, "whole number"),
    ({"ddp_timeout": 0}, "greater than 0"),
]


@pytest.mark.parametrize(("given", "expected_text"), REFUSED, ids=[str(g) for g, _ in REFUSED])
def test_illegal_values_and_pairs_are_refused_with_what_was_passed(given, expected_text):
    with pytest.raises(ConfigError) as caught:
        TrainingArguments(**given)
    (problem,) = caught.value.problems
    assert next(iter(given)) in problem.what
    assert expected_text in f"{problem.what} {problem.why}"


@pytest.mark.parametrize(
    "given",
    [
        {"num_train_epochs": 0, "max_steps": 5},
        {"logging_steps": 0, "logging_strategy": "no"},
        {"eval_steps": 0},
        {"max_grad_norm": 0},
        {"learning_rate": 0},
        {"warmup_steps": 1, "warmup_ratio": 1},
        {"logging_steps": 0.5},
        {"offload_param": "cpu"},  # stage "auto" then means 3
        {"offload_optimizer": "cpu", "zero_stage": 1},
        {"dataloader_prefetch_factor": 1, "dataloader_num_workers": 1},
    ],
    ids=str,
)
def test_values_at_the_edge_are_taken(given):
    """Catches a check that is stricter than the documentation."""
    TrainingArguments(**given)


def test_all_wrong_types_come_in_one_error():
    with pytest.raises(ConfigError) as caught:
        TrainingArguments(learning_rate="fast", seed="x", optim="nothing", bf16="maybe")
    assert {p.what.split("=")[0] for p in caught.value.problems} == {
        "learning_rate", "seed", "optim", "bf16",
    }  # fmt: skip


def test_all_illegal_values_of_all_groups_come_in_one_error():
    """One mistake per mixin: catches a group whose check is not called."""
    with pytest.raises(ConfigError) as caught:
        TrainingArguments(
            ddp_timeout=0,
            gradient_accumulation_steps=0,
            learning_rate=-1,
            fp16=True,
            bf16=True,
            zero_stage=0,
            offload_optimizer="cpu",
            eval_strategy="steps",
            eval_steps=-1,
            logging_steps=-1,
        )
    assert len(caught.value.problems) == 7


def test_an_unknown_name_is_a_type_error_of_python():
    with pytest.raises(TypeError, match="learnin_rate"):
        TrainingArguments(learnin_rate=1e-3)


# --- one message ---------------------------------------------------------------------------------


def test_values_that_cannot_be_read_do_not_hide_what_else_is_wrong():
    with pytest.raises(ConfigError) as caught:
        TrainingArguments(
            "out",
            learning_rate="abc",
            lr_scheduler_kwargs="no JSON",
            per_device_train_batch_size=0,
            bf16=True,
            fp16=True,
            tpu_num_cores=8,
        )
    whats = [problem.what.split("=")[0] for problem in caught.value.problems]
    assert whats[:2] == ["learning_rate", "lr_scheduler_kwargs"]
    assert {"per_device_train_batch_size", "tpu_num_cores"} <= set(whats)
    assert "fp16" in str(caught.value), "two formats at once"


def test_what_stands_in_for_an_unreadable_value_is_not_blamed():
    with pytest.raises(ConfigError) as caught:
        TrainingArguments(
            "out", eval_strategy="epoch", save_strategy="epok", load_best_model_at_end=True
        )
    (problem,) = caught.value.problems
    assert problem.what == "save_strategy='epok'"


def test_an_assigned_value_that_cannot_be_read_stays_as_it_was_assigned():
    args = TrainingArguments("out")
    args.learning_rate = "abc"
    with pytest.raises(ConfigError):
        args.validate()
    assert args.learning_rate == "abc"
