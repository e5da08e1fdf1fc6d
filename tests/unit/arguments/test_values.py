"""Defaults, conversion of what files and shells hand over, and what is derived from it."""

from __future__ import annotations

import dataclasses
import enum
import math
import re
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
        *(("logging_steps", 5, 5), ("logging_steps", 20.0, 20), ("save_steps", "1e3", 1000)),
        *(("warmup_steps", 10, 10), ("warmup_steps", 0.5, 0.5), ("eval_delay", "3", 3)),
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
    class Schedule(enum.Enum):
        POLYNOMIAL = "polynomia"

    with pytest.raises(ConfigError, match="lr_scheduler_type='polynomia'[^$]*did you mean"):
        TrainingArguments(lr_scheduler_type=Schedule.POLYNOMIAL)


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


# --- convert_values ------------------------------------------------------------------------------


def test_convert_values_leaves_out_what_was_not_given_and_what_is_wrong():
    converted, problems = convert_values(TrainingArguments, {"seed": "7", "bf16": "maybe"})
    assert converted == {"seed": 7}
    assert [p.what for p in problems] == ["bf16='maybe'"]
