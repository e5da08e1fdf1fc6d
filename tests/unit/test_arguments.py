"""``TrainingArguments``: documented defaults, conversion of what files and shells hand over, and
one error for all mistakes."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.arguments.fields import arg, convert_values, default_of
from dstrain.core.errors import ConfigError


def field_names(cls: type[Any] = TrainingArguments) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


# --- defaults ------------------------------------------------------------------------------------


def test_defaults_survive_construction_unchanged():
    """Catches a default that is not of its field's declared type, so that it "changes" itself."""
    assert TrainingArguments().changed_fields() == frozenset()


@pytest.mark.parametrize("field", dataclasses.fields(TrainingArguments), ids=lambda f: f.name)
def test_every_field_explains_itself_and_is_legal_by_default(field):
    text = field.metadata["help"]
    assert text.endswith("."), "a sentence, for `--help`"
    assert not re.search(r"\btodo\b", text, re.IGNORECASE)
    choices = field.metadata.get("choices")
    assert choices is None or default_of(field) is None or default_of(field) in choices


def test_output_dir_is_the_first_positional_argument():
    """``TrainingArguments("out")`` is how everyone writes it."""
    assert TrainingArguments("somewhere").output_dir == "somewhere"
    assert field_names()[0] == "output_dir"


def test_every_scheduler_offered_is_one_of_transformers():
    """A name that ``get_scheduler`` does not know would fail after the model is built."""
    from transformers import SchedulerType

    field = next(f for f in dataclasses.fields(TrainingArguments) if f.name == "lr_scheduler_type")
    assert set(field.metadata["choices"]) <= {member.value for member in SchedulerType}


def test_mutable_defaults_are_not_shared():
    @dataclass
    class WithList:
        names: list[str] = arg(["a"], "Names.")

    first = WithList()
    first.names.append("b")
    assert WithList().names == ["a"]


# --- conversion ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("learning_rate", "5e-5", 5e-5),
        ("learning_rate", 1, 1.0),
        ("per_device_train_batch_size", "16", 16),
        ("per_device_train_batch_size", 16.0, 16),
        ("max_steps", "1e3", 1000),
        ("max_steps", "-1", -1),
        ("seed", "12345678901234567", 12345678901234567),  # a float would make it ...568
        ("bf16", "true", True),
        ("bf16", "False", False),
        ("bf16", "1", True),
        ("bf16", "no", False),
        ("tf32", "none", None),
        ("tf32", "true", True),
        ("eval_steps", "0.25", 0.25),
        ("eval_steps", "None", None),
        ("data_seed", "7", 7),
        ("label_names", "labels, start_positions", ["labels", "start_positions"]),
        ("label_names", ("labels",), ["labels"]),
        ("report_to", "none", []),
        ("report_to", "wandb", ["wandb"]),
        ("zero_stage", 3, "3"),
        ("zero_stage", "3", "3"),
        ("output_dir", Path("out") / "run", str(Path("out") / "run")),
        ("lr_scheduler_kwargs", '{"min_lr": 1e-6}', {"min_lr": 1e-6}),
        ("lr_scheduler_kwargs", "none", {}),
        ("lr_scheduler_kwargs", None, {}),
        ("deepspeed", '{"train_batch_size": 8}', '{"train_batch_size": 8}'),  # its owner parses it
    ],
)
def test_text_from_files_and_shells_gets_the_declared_type(name, given, expected):
    more = {"eval_strategy": "epoch"} if name == "eval_steps" else {}
    value = getattr(TrainingArguments(**{name: given}, **more), name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "given", "expected_text"),
    [
        ("learning_rate", "fast", "expected a number"),
        ("learning_rate", [1e-3], "expected a number"),
        ("learning_rate", True, "expected a number"),
        ("per_device_train_batch_size", "8.5", "expected an integer"),
        ("per_device_train_batch_size", 8.5, "expected an integer"),
        ("seed", "inf", "expected an integer"),
        ("seed", True, "expected an integer"),
        ("seed", None, "a value is needed"),
        ("bf16", "maybe", "expected true or false"),
        ("bf16", 1, "expected true or false"),
        ("tf32", "on and off", "expected true or false or none"),
        ("output_dir", True, "expected a text"),
        ("run_name", 5, "expected a text"),
        ("deepspeed", True, "expected an object"),
        ("deepspeed", 3, "expected an object"),
        ("lr_scheduler_kwargs", "[1]", "expected a JSON object"),
        ("lr_scheduler_kwargs", "{", "expected a JSON object"),
        ("zero_stage", True, "zero_stage=True"),
        ("zero_stage", 4, "expected one of auto, 0, 1, 2, 3"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_name_and_what_is_expected(
    name, given, expected_text
):
    with pytest.raises(ConfigError) as caught:
        TrainingArguments(**{name: given})
    message = str(caught.value)
    assert message.startswith(name)
    assert expected_text in message


@pytest.mark.parametrize(
    "name", [f.name for f in dataclasses.fields(TrainingArguments) if "float" in str(f.type)]
)
@pytest.mark.parametrize("given", [math.nan, "nan", math.inf, "1e400"])
def test_nan_and_infinity_are_refused_everywhere(name, given):
    """Comparisons with NaN are false, so it slips through every check of a range."""
    with pytest.raises(ConfigError, match=rf"{name}=(nan|inf)"):
        TrainingArguments(**{name: given})


@pytest.mark.parametrize(
    ("name", "given", "close"),
    [
        ("optim", "adamw_torc", "adamw_torch"),
        ("lr_scheduler_type", "cosin", "cosine"),
        ("eval_strategy", "step", "steps"),
        ("nan_loss", "stopp", "stop"),
    ],
)
def test_an_unknown_choice_names_the_nearest(name, given, close):
    with pytest.raises(ConfigError, match=f"did you mean '{close}'"):
        TrainingArguments(**{name: given})


def test_enums_of_transformers_are_taken():
    """Scripts pass ``IntervalStrategy.STEPS`` and the like; equality with "steps" must hold."""
    from transformers import IntervalStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    args = TrainingArguments(
        logging_strategy=IntervalStrategy.EPOCH,
        eval_strategy=IntervalStrategy.STEPS,
        lr_scheduler_type=SchedulerType.COSINE,
        optim=OptimizerNames.ADAMW_TORCH_FUSED,
    )
    got = (args.logging_strategy, args.eval_strategy, args.lr_scheduler_type, args.optim)
    assert got == ("epoch", "steps", "cosine", "adamw_torch_fused")
    assert all(type(value.value) is str for value in got)


def test_an_enum_that_we_do_not_have_is_refused():
    from transformers import SchedulerType

    with pytest.raises(ConfigError, match="lr_scheduler_type='greedy'|reduce_lr_on_plateau"):
        TrainingArguments(lr_scheduler_type=SchedulerType.REDUCE_ON_PLATEAU)


def test_home_is_expanded_in_output_dir(monkeypatch):
    """Catches a folder literally called "~" in the current one."""
    monkeypatch.setenv("HOME", "/somebody")
    assert TrainingArguments("~/run").output_dir == "/somebody/run"


def test_construction_makes_no_folder(tmp_path):
    TrainingArguments(str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_the_deepspeed_dict_is_not_changed_or_copied_by_the_arguments():
    given = {"zero_optimization": {"stage": 3}}
    assert TrainingArguments(deepspeed=given).deepspeed is given
    assert given == {"zero_optimization": {"stage": 3}}


# --- derived values ------------------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "expected"), [("no", False), ("steps", True)])
def test_do_eval_follows_the_evaluation_strategy(strategy, expected):
    assert TrainingArguments(eval_strategy=strategy).do_eval is expected


def test_eval_steps_falls_back_to_logging_steps_only_where_it_is_used():
    assert TrainingArguments(eval_strategy="steps", logging_steps=20).eval_steps == 20
    assert TrainingArguments(eval_strategy="steps", logging_steps=20, eval_steps=5).eval_steps == 5
    assert TrainingArguments(eval_strategy="epoch", logging_steps=20).eval_steps is None


def test_pinned_memory_is_off_on_the_cpu():
    assert TrainingArguments(use_cpu=True).dataloader_pin_memory is False


@pytest.mark.parametrize(
    ("given", "num_training_steps", "expected"),
    [
        ({}, 1000, 0),
        ({"warmup_steps": 50}, 1000, 50),
        ({"warmup_steps": 1}, 1000, 1),
        ({"warmup_steps": 0.1}, 1000, 100),
        ({"warmup_steps": "0.1"}, 1000, 100),
        ({"warmup_ratio": 0.1}, 1000, 100),
        ({"warmup_ratio": 0.1}, 15, 2),  # rounded up
        ({"warmup_steps": 50, "warmup_ratio": 0.5}, 1000, 50),  # the count wins
        ({"warmup_steps": 0.1, "warmup_ratio": 0.5}, 1000, 100),
        ({"warmup_ratio": 1.0}, 7, 7),
    ],
)
def test_warmup_is_a_count_or_a_share_and_the_steps_win(given, num_training_steps, expected):
    steps = TrainingArguments(**given).get_warmup_steps(num_training_steps)
    assert steps == expected
    assert type(steps) is int


def test_scheduler_kwargs_are_a_dict_of_their_own():
    """``get_scheduler`` may change what it is given; the arguments must stay as written."""
    args = TrainingArguments(lr_scheduler_kwargs={"min_lr": 0.1})
    args.scheduler_kwargs()["min_lr"] = 5
    assert args.lr_scheduler_kwargs == {"min_lr": 0.1}
    assert TrainingArguments().scheduler_kwargs() == {}


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
    assert list(values) == field_names()
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


# --- convert_values ------------------------------------------------------------------------------


def test_convert_values_leaves_out_what_was_not_given_and_what_is_wrong():
    converted, problems = convert_values(TrainingArguments, {"seed": "7", "bf16": "maybe"})
    assert converted == {"seed": 7}
    assert [p.what for p in problems] == ["bf16='maybe'"]


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
