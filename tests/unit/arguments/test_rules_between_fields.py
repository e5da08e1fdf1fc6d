"""Rules between several arguments, and values that follow from other arguments."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dstrain.arguments import (
    TrainingArguments,
)
from dstrain.core.errors import ConfigError

BEST: dict[str, Any] = {"load_best_model_at_end": True, "eval_strategy": "steps"}
RULES_BETWEEN_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"fp16_full_eval": True, "bf16_full_eval": True}, "one 16-bit format"),
    ({"save_steps": -1}, "a number of steps"),
    ({"save_steps": 2.5}, "whole number"),
    ({"save_strategy": "best"}, "only an evaluation finds out"),
    ({"save_on_each_node": True, "checkpoint_format": "deepspeed"}, "files of all ranks in one"),
    ({**BEST, "save_strategy": "epoch"}, "every checkpoint needs an evaluation"),
    ({**BEST, "eval_strategy": "no"}, "every checkpoint needs an evaluation"),
    ({**BEST, "eval_steps": 100, "save_steps": 250}, "no evaluation of their own"),
    ({**BEST, "eval_steps": 0.1, "save_steps": 0.25}, "no evaluation of their own"),
    ({**BEST, "eval_steps": 0.1, "save_steps": 100}, "a share of all steps"),
    ({"torch_empty_cache_steps": 0}, "above 0"),
    ({"label_smoothing_factor": 1.5}, "between 0 and 1"),
    ({"eval_accumulation_steps": 0}, "at least 1"),
    ({"eval_strategy": "steps", "logging_steps": 0, "logging_strategy": "no"}, "positive number"),
    ({"accelerator_config": {"split_batch": True}}, "did you mean 'split_batches'"),
    ({"accelerator_config": {"use_configured_state": True}}, "no accelerate state"),
    ({"accelerator_config": "/no/such/file.json"}, "no JSON file"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "only an evaluation"),
    ({"debug": "underflow"}, "did you mean 'underflow_overflow'"),
    ({"neftune_noise_alpha": -1.0}, "0 or more"),
    ({"include_num_input_tokens_seen": "padding"}, "did you mean 'non_padding'"),
    ({"debug": ["underflow_overflow", "tpu_metrics_debug"]}, "does not train on TPUs"),
]


@pytest.mark.parametrize(("given", "text"), RULES_BETWEEN_FIELDS, ids=str)
def test_rules_between_fields(given, text):
    with pytest.raises(ConfigError) as caught:
        TrainingArguments(**given)
    assert any(text in str(problem) for problem in caught.value.problems)


@pytest.mark.parametrize(
    "given",
    [
        {"eval_steps": 100, "save_steps": 300},
        {"eval_steps": 0.1, "save_steps": 0.3},
        {"eval_steps": 100, "save_strategy": "best"},
        {"save_strategy": "epoch", "eval_strategy": "epoch"},
    ],
    ids=str,
)
def test_an_evaluation_at_every_checkpoint_is_enough_for_the_best_model(given):
    args = TrainingArguments(**{**BEST, **given})
    assert (args.metric_for_best_model, args.greater_is_better) == ("loss", False)


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_a_metric_needs_an_evaluation(name):
    assert "only an evaluation" in str(TrainingArguments()._evaluation_problems(name)[0])
    assert not TrainingArguments(eval_strategy="epoch")._evaluation_problems(name)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [(None, ("loss", False)), ("eval_loss", ("eval_loss", False)), ("f1", ("f1", True))],
)
def test_metric_and_direction_of_the_best_model_have_their_documented_defaults(metric, expected):
    args = TrainingArguments(**BEST, metric_for_best_model=metric)
    assert (args.metric_for_best_model, args.greater_is_better) == expected


def test_accelerator_config_as_dict_text_and_file(tmp_path):
    expected = {"split_batches": False, "even_batches": True}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(expected))
    for given in (expected, json.dumps(expected), str(file), '{"split_batches": "false",'
                  ' "even_batches": "True"}'):  # fmt: skip
        assert TrainingArguments(accelerator_config=given).accelerator_config == expected
