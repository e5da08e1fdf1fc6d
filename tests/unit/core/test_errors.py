"""Errors for users: every problem in one message, kept as data, and able to cross ranks."""

from __future__ import annotations

import pickle

import pytest

from dstrain.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DstrainError,
    ModelError,
    Problem,
    TrainingError,
    collected,
    nearest,
    raise_errors,
    raise_problems,
)

USER_ERRORS = [ConfigError, DataError, ModelError, CheckpointError, TrainingError]
TWO = [Problem("a=1", "why a", "fix a"), Problem("b=2", "why b")]


def test_one_problem_says_what_why_and_fix_in_that_order_without_a_heading():
    """A single mistake must not come as "1 problems:" with a bullet."""
    message = str(ConfigError(Problem("a=1", "it must be 2", "write 2")))
    assert message == "a=1\n    why: it must be 2\n    fix: write 2"


def test_empty_why_and_remedy_leave_no_empty_line():
    assert str(ConfigError(Problem("a=1"))) == "a=1"
    assert str(ConfigError("a=1")) == "a=1"


def test_all_problems_stand_in_one_message_indented_under_its_heading():
    """Catches a message that keeps the first problem only, or whose lines run into each other."""
    message = str(ConfigError(TWO, title="the arguments"))
    assert message.splitlines() == [
        "the arguments:",
        "  - a=1",
        "      why: why a",
        "      fix: fix a",
        "  - b=2",
        "      why: why b",
    ]


def test_without_a_title_several_problems_are_counted():
    assert str(ConfigError(TWO)).startswith("2 problems:\n")


def test_a_title_is_kept_for_a_single_problem():
    assert str(ConfigError(TWO[:1], title="the arguments")).startswith("the arguments:\n  - a=1")


def test_problems_stay_available_as_data():
    """Callers merge the problems of several errors into one: see ``cli/flags.py``."""
    assert ConfigError(TWO).problems == tuple(TWO)
    assert ConfigError("text").problems == (Problem("text"),)


@pytest.mark.parametrize("error", USER_ERRORS)
def test_an_error_crosses_ranks_with_its_type_message_and_problems(error):
    """``all_or_none`` sends errors as pickles; a lost argument would fail on the other rank."""
    sent = error(TWO, title="heading")
    received = pickle.loads(pickle.dumps(sent))
    assert type(received) is error
    assert str(received) == str(sent)
    assert received.problems == sent.problems


@pytest.mark.parametrize("error", USER_ERRORS)
def test_every_user_error_is_a_dstrain_error(error):
    """The command line turns only ``DstrainError`` into a message without a traceback."""
    assert issubclass(error, DstrainError)


@pytest.mark.parametrize("error", [ConfigError, DataError, ModelError])
def test_bad_input_is_a_value_error_too(error):
    """Code written for transformers catches ``ValueError``."""
    assert issubclass(error, ValueError)


def test_raise_problems_does_nothing_without_problems():
    raise_problems([])


def test_raise_problems_raises_the_asked_type_with_all_of_them():
    with pytest.raises(DataError, match=r"a=1[\s\S]*b=2"):
        raise_problems(TWO, error=DataError)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("learning_rat", "learning_rate"), ("warmup_step", "warmup_steps"), ("zzz", None)],
)
def test_nearest_finds_a_slip_of_the_pen_and_nothing_else(name, expected):
    assert nearest(name, {"learning_rate", "warmup_steps"}) == expected


def test_collected_keeps_user_errors_and_lets_the_next_check_run():
    """Catches a run that stops at its first mistake, so that the user mends them one by one."""
    errors: list[DstrainError] = []
    with collected(errors):
        raise ConfigError(TWO[0])
    with collected(errors):
        raise DataError(TWO[1])
    with pytest.raises(ConfigError) as caught:
        raise_errors(errors)
    assert caught.value.problems == tuple(TWO)


def test_collected_lets_a_defect_of_ours_through():
    with pytest.raises(KeyError), collected([]):
        raise KeyError("a bug, not a mistake of the user")


def test_raise_errors_keeps_the_type_of_a_single_error_and_ignores_none():
    raise_errors([])
    only = DataError(TWO[0])
    with pytest.raises(DataError) as caught:
        raise_errors([only])
    assert caught.value is only


def test_several_lines_of_a_library_stay_under_their_own_problem():
    """Catches a quoted message whose second line looks like the next problem."""
    message = str(ConfigError([Problem("a", "first\nsecond"), Problem("b")]))
    assert [line for line in message.splitlines() if not line.startswith("      ")] == [
        "2 problems:",
        "  - a",
        "  - b",
    ]
