"""What was changed, subclasses, records without tokens, this process, transformers' parser."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.core.errors import ConfigError

# --- changed_fields ------------------------------------------------------------------------------


def test_changed_fields_are_those_that_differ_from_their_default():
    args = TrainingArguments(learning_rate=1e-3, seed=42, weight_decay="0.0", optim="sgd")
    assert args.changed_fields() == {"learning_rate", "optim"}


def test_changed_fields_follow_later_assignment():
    """Config resolution runs again for every train(): it must see what the user set in between."""
    args = TrainingArguments()
    args.learning_rate = 1e-3
    assert args.changed_fields() == {"learning_rate"}


# --- subclasses ----------------------------------------------------------------------------------


@dataclass
class WithTemperature(TrainingArguments):
    """A user's arguments."""

    temperature: float = 1.0
    prompts: dict[str, str] | None = None

    def _problems(self) -> list[Any]:
        return super()._problems()


def test_a_subclass_adds_fields_that_are_converted_and_reported_like_ours():
    args = WithTemperature("out", temperature="0.5", prompts='{"query": "q: "}', learning_rate=1e-3)
    assert args.temperature == 0.5
    assert args.prompts == {"query": "q: "}
    assert args.changed_fields() == {"output_dir", "temperature", "prompts", "learning_rate"}
    assert args.to_dict()["temperature"] == 0.5


def test_a_subclass_reports_its_own_mistakes_together_with_ours():
    with pytest.raises(ConfigError) as caught:
        WithTemperature(temperature="warm", seed="x")
    assert len(caught.value.problems) == 2


# --- records -------------------------------------------------------------------------------------


def test_to_dict_has_every_field_with_its_value():
    args = TrainingArguments("out", deepspeed={"bf16": {"enabled": True}}, label_names=["labels"])
    values = args.to_dict()
    assert list(values) == [f.name for f in dataclasses.fields(TrainingArguments)]
    assert values["deepspeed"] == {"bf16": {"enabled": True}}
    assert TrainingArguments(**values) == args


def test_to_json_string_reads_back():
    args = TrainingArguments("out", learning_rate=1e-3, report_to=["none"])
    assert TrainingArguments(**json.loads(args.to_json_string())) == args


def test_to_json_string_takes_what_json_does_not_know():
    """A dict config may hold Python objects, such as a process group."""
    args = TrainingArguments(deepspeed={"mpu": object()})
    assert "object at" in json.loads(args.to_json_string())["deepspeed"]["mpu"]


def test_to_sanitized_dict_has_plain_values_only():
    """TensorBoard's hparams accept nothing else."""
    args = TrainingArguments(
        label_names=["labels"], deepspeed={"a": 1}, per_device_train_batch_size=3
    )
    values = args.to_sanitized_dict()
    assert {type(v) for v in values.values()} <= {bool, int, float, str}
    assert values["label_names"] == "['labels']"
    assert values["train_batch_size"] == 3
    assert values["eval_batch_size"] == 8
    assert values["learning_rate"] == 5e-5


# --- this process among the ranks ----------------------------------------------------------------


@pytest.fixture
def on_rank(monkeypatch) -> Callable[[int, int, int], None]:
    """Pretend to be a rank that a launcher started."""

    def pretend(rank: int, local_rank: int, world_size: int) -> None:
        for name, value in (
            ("RANK", rank),
            ("LOCAL_RANK", local_rank),
            ("WORLD_SIZE", world_size),
        ):
            monkeypatch.setenv(name, str(value))

    return pretend


def test_rank_properties_come_from_the_launcher(on_rank):
    on_rank(5, 1, 8)
    args = TrainingArguments()
    assert (args.process_index, args.local_process_index, args.world_size) == (5, 1, 8)


@pytest.mark.parametrize(
    ("rank", "local_rank", "each_node", "logs"),
    [(0, 0, True, True), (4, 0, True, True), (4, 0, False, False), (1, 1, True, False)],
)
def test_should_log_is_once_per_node_or_once_at_all(on_rank, rank, local_rank, each_node, logs):
    on_rank(rank, local_rank, 8)
    args = TrainingArguments(log_on_each_node=each_node)
    assert args.should_log is logs
    assert args.should_save is (rank == 0)


@pytest.mark.parametrize(
    ("rank", "given", "expected"),
    [
        (0, {}, logging.INFO),
        (1, {}, logging.WARNING),
        (0, {"log_level": "debug"}, logging.DEBUG),
        (1, {"log_level": "debug"}, logging.WARNING),
        (1, {"log_level_replica": "error"}, logging.ERROR),
        (1, {"log_level_replica": "passive"}, logging.WARNING),
    ],
)
def test_log_level_of_main_and_other_ranks(on_rank, rank, given, expected):
    on_rank(rank, rank, 2)
    assert TrainingArguments(**given).get_process_log_level() == expected


# --- transformers' parser ------------------------------------------------------------------------


def hf_parse(*argv: str) -> TrainingArguments:
    from transformers import HfArgumentParser

    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(list(argv))
    return args


def test_hf_argument_parser_without_flags_gives_the_defaults():
    assert hf_parse() == TrainingArguments()


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        (["--learning_rate", "1e-3"], "learning_rate", 1e-3),
        (["--bf16"], "bf16", True),
        (["--bf16", "false"], "bf16", False),
        (["--no_remove_unused_columns"], "remove_unused_columns", False),
        (["--tf32", "true"], "tf32", True),
        (["--report_to", "tensorboard", "wandb"], "report_to", ["tensorboard", "wandb"]),
        (["--zero_stage", "3"], "zero_stage", "3"),
        (["--deepspeed", "zero3"], "deepspeed", "zero3"),
        (["--deepspeed", '{"bf16": {}}'], "deepspeed", '{"bf16": {}}'),
        (["--logging-steps", "0.1"], "logging_steps", 0.1),
        (["--warmup_steps", "10"], "warmup_steps", 10),
        (["--lr_scheduler_kwargs", '{"min_lr": 1e-6}'], "lr_scheduler_kwargs", {"min_lr": 1e-6}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_hf_argument_parser_reads_flags_of_every_kind(words, name, expected):
    """Scripts written for transformers parse our dataclass with its parser."""
    assert getattr(hf_parse("--output_dir", "out", *words), name) == expected


def test_hf_argument_parser_parse_dict_converts_text():
    """``parse_dict`` passes the values of a JSON file on as they are."""
    from transformers import HfArgumentParser

    given = {"output_dir": "out", "learning_rate": "3e-4", "bf16": "true", "max_steps": "1e3"}
    (args,) = HfArgumentParser(TrainingArguments).parse_dict(given)
    assert (args.learning_rate, args.bf16, args.max_steps) == (3e-4, True, 1000)
