"""The arguments that callbacks are given have the values that run, and take assignments."""

from __future__ import annotations

from typing import Any

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.config import Facts, ResolvedConfig, resolve
from dstrain.config.resolution.running import ShownArguments

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
}


@pytest.fixture
def args() -> TrainingArguments:
    return TrainingArguments("out", deepspeed=CONFIG)


@pytest.fixture
def decided(args: TrainingArguments) -> ResolvedConfig:
    return resolve(args, Facts())


def test_the_values_that_run_are_shown_and_the_users_object_keeps_its_own(args, decided):
    with ShownArguments().of(args, decided) as seen:
        assert (seen.per_device_train_batch_size, seen.learning_rate) == (2, 1e-3)
        assert type(seen) is TrainingArguments
    assert (args.per_device_train_batch_size, args.learning_rate) == (8, 5e-5)


def test_the_copy_is_made_once_while_nothing_changes(args, decided):
    shown = ShownArguments()
    with shown.of(args, decided) as first:
        pass
    with shown.of(args, decided) as second:
        assert second is first is not args


def test_the_users_own_object_is_shown_where_nothing_differs():
    args = TrainingArguments("out", zero_stage=2)
    with ShownArguments().of(args, resolve(args, Facts())) as seen:
        assert seen is args
        seen.run_name = "a"
    assert args.run_name == "a"


def test_a_change_between_two_blocks_is_seen_in_the_second(args, decided):
    shown = ShownArguments()
    with shown.of(args, decided):
        pass
    args.run_name = "assigned"
    args.logging_steps = 7
    vars(args)["extra"] = "as set_* methods write"
    with shown.of(args, decided) as seen:
        assert (seen.run_name, seen.logging_steps, seen.learning_rate) == ("assigned", 7, 1e-3)
        assert seen.extra == "as set_* methods write"
    args.set_save(steps=3)
    with shown.of(args, decided) as seen:
        assert seen.save_steps == 3


def test_another_config_or_other_arguments_are_seen(args, decided):
    shown = ShownArguments()
    with shown.of(args, decided):
        pass
    args.deepspeed = CONFIG | {"train_micro_batch_size_per_gpu": 4}
    with shown.of(args, resolve(args, Facts())) as seen:
        assert seen.per_device_train_batch_size == 4
    other = TrainingArguments("elsewhere", deepspeed=CONFIG)
    with shown.of(other, decided) as seen:
        assert seen.output_dir == "elsewhere"


def test_an_assignment_in_a_block_reaches_the_users_object_and_what_runs_is_shown_again(
    args, decided
):
    shown = ShownArguments()
    with shown.of(args, decided) as seen:
        seen.run_name, seen.note, seen.learning_rate = "named", "new", 0.5
    assert (args.run_name, args.note, args.learning_rate) == ("named", "new", 0.5)
    assert args.per_device_train_batch_size == 8, "what was only shown is not assigned"
    with shown.of(args, decided) as seen:
        assert (seen.run_name, seen.note, seen.learning_rate) == ("named", "new", 1e-3)


def test_a_block_inside_another_does_not_assign_twice(args, decided):
    """A callback evaluates, whose callbacks assign; then the outer one assigns the same itself."""
    shown = ShownArguments()
    with shown.of(args, decided):
        with shown.of(args, decided) as inner:
            inner.run_name = "inner"
        assert args.run_name == "inner"
        args.run_name = "outer"
    assert args.run_name == "outer"
