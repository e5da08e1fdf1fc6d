"""Every argument of the installed transformers is one here too, whatever becomes of it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers

from dstrain.arguments import Seq2SeqTrainingArguments, TrainingArguments, enforce
from dstrain.arguments.choice import Choice
from dstrain.core.errors import ConfigError

PAIRS: list[tuple[type[Any], type[Any]]] = [
    (TrainingArguments, transformers.TrainingArguments),
    (Seq2SeqTrainingArguments, transformers.Seq2SeqTrainingArguments),
]
_KINDS = {"implemented", "deepspeed", "alias", "stored", "no effect", "refused"}


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_no_argument_of_the_installed_transformers_is_unknown_here(ours: Any, theirs: Any):
    """A release with a new argument fails here, until somebody says what becomes of it."""
    known = enforce.declared(ours)
    fields = {f.name for f in dataclasses.fields(theirs) if f.init}
    assert sorted(fields - known.keys()) == []
    for name in fields:
        treatment = known[name][0]
        assert treatment.kind in _KINDS, name
        assert treatment.kind not in ("refused", "no effect") or treatment.note, name


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_no_method_or_its_parameter_is_unknown_here(ours: Any, theirs: Any):
    for name, method in inspect.getmembers(theirs, inspect.isfunction):
        if name.startswith("_"):
            continue
        parameters = inspect.signature(getattr(ours, name)).parameters
        assert sorted(set(inspect.signature(method).parameters) - set(parameters)) == [], name


# --- sampling ------------------------------------------------------------------------------------


def test_both_ways_to_group_by_length_mean_the_same():
    assert TrainingArguments().sampling == "random"
    assert TrainingArguments(group_by_length=True).sampling == "group_by_length"
    chosen = TrainingArguments(train_sampling_strategy="group_by_length")
    assert chosen.sampling == "group_by_length"
    with pytest.raises(ConfigError, match="contradict"):
        TrainingArguments(group_by_length=True, train_sampling_strategy="sequential")
    with pytest.raises(ConfigError, match="did you mean 'sequential'"):
        TrainingArguments(train_sampling_strategy="sequentiel")


# --- two names of one argument -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_two_names_of_one_argument_read_the_same(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = TrainingArguments(**{name: True, f"{name}_kwargs": '{"use_reentrant": "true"}'})
    for one in (args, copy.deepcopy(args), dataclasses.replace(args)):
        assert (one.gradient_checkpointing, one.activation_checkpointing) == (True, True)
        kwargs = (one.gradient_checkpointing_kwargs, one.activation_checkpointing_kwargs)
        assert kwargs == ({"use_reentrant": True},) * 2
    again = pickle.loads(pickle.dumps(args))
    setattr(again, name, False)
    assert not again.gradient_checkpointing
    assert not again.activation_checkpointing
    again.set_training(gradient_checkpointing=True)
    assert again.activation_checkpointing


def test_a_copy_that_turns_it_on_or_off_does_so():
    off = TrainingArguments()
    assert dataclasses.replace(off, gradient_checkpointing=True).gradient_checkpointing
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        for other in ("gradient_checkpointing", "activation_checkpointing"):
            on = dataclasses.replace(off, **{name: True, f"{name}_kwargs": {"use_reentrant": True}})
            assert on.gradient_checkpointing
            again = dataclasses.replace(on, **{other: False, "seed": 3, f"{other}_kwargs": None})
            for one in (again, dataclasses.replace(again, output_dir="x", learning_rate=1.0)):
                assert not one.gradient_checkpointing
                assert not one.activation_checkpointing
                assert one.gradient_checkpointing_kwargs is None
                assert one.activation_checkpointing_kwargs is None
            assert dataclasses.replace(on, seed=3).activation_checkpointing


def test_a_copy_that_does_not_compile_does_not():
    on = TrainingArguments(torch_compile=True)
    assert on.torch_compile_backend == "inductor"
    off = dataclasses.replace(on, torch_compile=False)
    assert (off.torch_compile, off.torch_compile_backend) == (False, None)
    assert dataclasses.replace(on, seed=3).torch_compile
    assert dataclasses.replace(on, torch_compile=False, torch_compile_mode="x").torch_compile
    on.torch_compile = False
    on.validate()
    assert not on.torch_compile


# --- others --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"dataloader_multiprocessing_context": "spawn"}, "no loader processes to start"),
        ({"dataloader_multiprocessing_context": "thread"}, "expected one of fork, spawn"),
        ({"dataloader_in_order": False}, "dataloader_prefetch_factor"),
        ({"enable_jit_checkpoint": True, "preemption": "ignore"}, "leaves signals alone"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], text: str):
    with pytest.raises(ConfigError, match=text):
        TrainingArguments(**arguments)


def test_preemption_is_what_saves_when_a_signal_comes():
    assert TrainingArguments(enable_jit_checkpoint=True).preemption == "exit"


def test_a_static_graph_is_said_to_be_without_effect():
    with pytest.warns(UserWarning, match="ddp_static_graph=True has no effect"):
        TrainingArguments(ddp_static_graph=True)


def test_parallelism_other_than_of_data_is_refused_with_what_to_use():
    accelerate = pytest.importorskip("accelerate")
    config = accelerate.ParallelismConfig
    assert TrainingArguments(parallelism_config=config()).parallelism_config is not None
    for sizes in ({"tp_size": 2}, {"sp_size": 2, "sp_backend": "deepspeed"}, {"dp_shard_size": 2}):
        with pytest.raises(ConfigError, match="set zero_stage to 3 for dp_shard_size"):
            TrainingArguments(parallelism_config=config(**sizes))
    with pytest.raises(ConfigError, match="parallelism_config"):
        TrainingArguments(parallelism_config={"tp_size": 2})


# --- values as transformers has them -------------------------------------------------------------


@pytest.mark.parametrize("order", [list, sorted])
def test_a_file_with_every_argument_in_any_order_is_no_copy_of_arguments(order: Any):
    """Take a value that was changed by hand in the file, under the older of its two names."""
    values = TrainingArguments("out").to_dict() | {"gradient_checkpointing_kwargs": {"a": 1}}
    args = TrainingArguments(**{name: values[name] for name in order(values)})
    assert args.gradient_checkpointing_kwargs == args.activation_checkpointing_kwargs == {"a": 1}


def test_values_of_a_few_names_read_like_members_of_enums():
    """And like plain texts, in every way that a script can look at them."""
    theirs = transformers.TrainingArguments(
        eval_strategy="steps", save_strategy="best", lr_scheduler_type="cosine",
        hub_strategy="checkpoint", logging_strategy="epoch", optim="adamw_torch",
        metric_for_best_model="loss", debug="underflow_overflow", report_to="none",
    )  # fmt: skip
    names = ("eval_strategy", "save_strategy", "lr_scheduler_type", "hub_strategy", "optim")
    args = TrainingArguments(
        **{name: getattr(theirs, name) for name in (*names, "logging_strategy", "debug")}
    )
    for ours in (args, copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        for name in (*names, "logging_strategy"):
            mine, other = getattr(ours, name), getattr(theirs, name)
            assert mine == other == mine.value == other.value
            assert other == mine
            assert (mine.name, str(mine), f"{mine}") == (other.name, other.value, other.value)
            assert repr(mine) == repr(other.value)
            assert json.loads(json.dumps({name: mine})) == {name: other.value}
        assert ours.debug == theirs.debug
        assert theirs.debug[0] in ours.debug
        assert ours.debug[0].value == "underflow_overflow"
    assert type(args.to_dict()["eval_strategy"]) is str
    assert [type(option) for option in args.to_dict()["debug"]] == [str]


def test_members_have_the_names_that_transformers_gives_them():
    from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy
    from transformers.training_args import OptimizerNames, SchedulerType

    for kind in (HubStrategy, IntervalStrategy, SaveStrategy, OptimizerNames, SchedulerType):
        for member in kind:
            assert Choice(member.value).name == member.name


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("report_to", ["none", ["none"], "wandb", ["wandb"]]),
        ("include_num_input_tokens_seen", [False, True, "all", "no", "non_padding"]),
        ("debug", ["", "underflow_overflow", None]),
    ],
)
def test_a_value_is_made_of_what_was_given_as_in_transformers(name: str, values: list[Any]):
    for value in values:
        theirs = transformers.TrainingArguments(**{"report_to": "none", name: value})
        assert getattr(TrainingArguments(**{name: value}), name) == getattr(theirs, name), value


def test_no_steps_mean_what_they_mean_in_transformers():
    for name in ("logging_steps",):
        with pytest.raises(ValueError, match=name):
            TrainingArguments(**{name: 0})
        with pytest.raises(ValueError, match=name):
            transformers.TrainingArguments(**{name: 0}, report_to="none")
    for cls in (TrainingArguments, transformers.TrainingArguments):
        args = cls(eval_strategy="steps", eval_steps=0, logging_steps=7, save_steps=0)
        assert (args.eval_steps, args.save_steps) == (7, 0)
    with pytest.raises(ConfigError, match="save_steps=-1"):
        TrainingArguments(save_steps=-1)


@pytest.mark.parametrize("value", [1.0, "none", "None", 0, -1])
def test_steps_between_two_emptied_caches_are_whole_and_above_0(value: Any):
    with pytest.raises(ValueError, match="torch_empty_cache_steps"):
        transformers.TrainingArguments(torch_empty_cache_steps=value, report_to="none")
    with pytest.raises(ConfigError, match="torch_empty_cache_steps"):
        TrainingArguments(torch_empty_cache_steps=value)
    assert TrainingArguments(torch_empty_cache_steps=3).torch_empty_cache_steps == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("torch_empty_cache_steps", 1.0),
        ("torch_empty_cache_steps", "none"),
        ("accelerator_config", dict),
        ("accelerator_config", "there-is-none.json"),
        ("per_gpu_train_batch_size", "many"),
        ("no_cuda", "perhaps"),
        ("evaluation_strategy", "sometimes"),
    ],
)
def test_what_is_wrong_is_wrong_when_it_is_checked_again(name: str, value: Any):
    args = TrainingArguments()
    setattr(args, name, value)
    said = []
    for _ in range(2):
        with pytest.raises(ConfigError, match=name.removeprefix("evaluation_")) as caught:
            args.validate()
        said.append(str(caught.value))
        assert getattr(args, name) is value
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("save", "evaluation", "is_multiple"),
    [
        (2e-7, 1e-7, True), (3e-7, 2e-7, False), (0.3, 0.1, True), (1 / 3, 1 / 6, True),
        (0.5, 5e-324, True), (1e-9, 0.5, False), (0.05, 0.1, False), (500, 100, True),
        (500, 300, False),
    ],
)  # fmt: skip
def test_a_share_of_all_steps_may_be_of_any_size(save: float, evaluation: float, is_multiple: bool):
    given = {"save_steps": save, "eval_steps": evaluation, "logging_steps": 1e-7}
    with contextlib.nullcontext() if is_multiple else pytest.raises(ConfigError, match="multiple"):
        TrainingArguments(eval_strategy="steps", load_best_model_at_end=True, **given)


def test_an_accelerator_config_is_a_dict_a_file_or_an_object_and_no_class(tmp_path: Path):
    from transformers.trainer_pt_utils import AcceleratorConfig

    path = tmp_path / "accelerator.json"
    path.write_text('{"split_batches": true}')
    for given in (path, str(path), {"split_batches": True}, AcceleratorConfig(split_batches=True)):
        args = TrainingArguments(accelerator_config=given)
        assert args.accelerator_config["split_batches"] is True
    with pytest.raises(
        ConfigError, match=r"AcceleratorConfig, a class[^$]*AcceleratorConfig\(\.\.\.\)"
    ):
        TrainingArguments(accelerator_config=AcceleratorConfig)
    with pytest.raises(ConfigError, match="no JSON file"):
        TrainingArguments(accelerator_config=tmp_path / "none.json")
