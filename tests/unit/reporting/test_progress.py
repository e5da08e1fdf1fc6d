"""Log lines, the progress bar, and the choice between them."""

from __future__ import annotations

import io
import math
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.reporting import (
    compat,
    progress_callback,
)
from dstrain.reporting.progress import ProgressBar, log_line


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (6.10234, "6.1023"),
        (2.0, "2"),
        (100.0, "100"),  # no zero of the number itself may go
        (0.0, "0"),
        (5e-5, "5e-05"),
        (1.23456e-7, "1.23e-07"),
        (-0.00012, "-0.00012"),
        (123456.7, "123,457"),
        (12345.6, "12345.6"),
        (20, "20"),
        (1234567, "1,234,567"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        ("text", "text"),
    ],
)
def test_a_number_is_short_and_true(value, shown):
    assert log_line({"x": value}, step=1) == f"step 1  x {shown}"


def test_a_log_line_has_the_step_once_and_the_figures_in_order():
    logs = {"loss": 6.5, "learning_rate": 5e-5, "step": 7, "epoch": 0.5}
    assert log_line(logs, step=20) == "step 20  loss 6.5  learning_rate 5e-05  epoch 0.5"


# --- progress bar --------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Run:
    """Sends a progress bar the events of a run, and reads what it wrote to standard error."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.capture = capture
        self.bar = ProgressBar()
        self.state = types.SimpleNamespace(is_world_process_zero=True, max_steps=4, global_step=0)

    def send(self, event: str, **kwargs: Any) -> None:
        getattr(self.bar, event)(None, self.state, None, **kwargs)

    def step(self, number: int) -> None:
        self.state.global_step = number
        self.send("on_step_end")

    def lines(self) -> list[str]:
        """Return what was written since the last look, each redraw of a bar as a line."""
        text = self.capture.readouterr().err.replace("\r", "\n").replace("\x1b[A", "")
        return [line.rstrip() for line in text.split("\n") if line.strip()]


@pytest.fixture
def run(capsys) -> Iterator[Run]:
    """Run four steps on the main rank, with standard error in a file."""
    run = Run(capsys)
    yield run
    run.send("on_evaluate")
    run.send("on_train_end")


def train(run: Run) -> None:
    """Run four steps with one log."""
    run.send("on_train_begin")
    for number in range(1, 5):
        run.step(number)
        if number == 2:
            logs = {"loss": 1.23456, "tokens_per_second": 12345.6, "learning_rate": 5e-5}
            run.send("on_log", logs=logs)
    run.send("on_train_end")


def test_the_bar_shows_steps_loss_speed_and_time(run):
    train(run)
    last = [line for line in run.lines() if line.startswith("train")][-1]
    assert "100%" in last
    assert "4/4" in last
    assert "loss=1.2346" in last
    assert "tok/s=12,346" in last


def test_the_other_figures_are_written_above_the_bar(run):
    train(run)
    line = "step 2  loss 1.2346  tokens_per_second 12345.6  learning_rate 5e-05"
    assert run.lines().count(line) == 1


def test_a_bar_in_a_file_is_not_redrawn_at_every_step(run):
    """Logs of a cluster job must not fill with thousands of bars."""
    run.state.max_steps = 500
    run.send("on_train_begin")
    for number in range(1, 501):
        run.step(number)
    run.send("on_train_end")
    assert 1 <= len(run.lines()) <= 3


def test_a_bar_on_a_terminal_may_be_redrawn_often(run, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run.send("on_train_begin")
    assert run.bar._train is not None
    assert run.bar._train.mininterval < 1
    run.send("on_train_end")


def test_other_ranks_show_nothing(run):
    """Eight bars on one screen are none."""
    run.state.is_world_process_zero = False
    train(run)
    run.send("on_prediction_step", eval_dataloader=[1, 2])
    run.send("on_evaluate")
    assert run.lines() == []


def test_an_evaluation_has_a_bar_of_its_own_each_time(run):
    for _ in range(2):
        for _ in range(3):
            run.send("on_prediction_step", eval_dataloader=[1, 2, 3])
        run.send("on_evaluate", metrics={})
        assert any(line.startswith("eval") and "0/3" in line for line in run.lines())


def test_an_evaluation_of_unknown_length_is_shown_too(run):
    run.send("on_prediction_step", eval_dataloader=iter([1]))
    run.send("on_evaluate")
    assert any(line.startswith("eval") for line in run.lines())


def test_prediction_closes_its_bar(run):
    run.send("on_prediction_step", eval_dataloader=[1])
    run.send("on_predict", metrics={})
    assert run.bar._eval is None


def test_a_second_training_begins_at_its_own_first_step(run):
    """Catches a bar that goes on counting, or jumps backwards."""
    train(run)
    run.state.global_step = 0
    run.send("on_train_begin")
    run.step(1)
    run.send("on_train_end")
    last = run.lines()[-1]
    assert last.startswith("train")
    assert "1/4" in last


def test_a_resumed_training_begins_where_it_was_left(run):
    run.state.global_step = 3
    run.send("on_train_begin")
    assert "3/4" in run.lines()[0]
    run.step(4)
    run.send("on_train_end")
    assert "4/4" in run.lines()[-1]


def test_a_log_without_a_loss_does_not_wipe_the_last_one(run):
    """Evaluation logs come between training logs."""
    run.send("on_train_begin")
    run.send("on_log", logs={"loss": 1.5})
    run.send("on_log", logs={"eval_loss": 2.5})
    run.send("on_train_end")
    lines = run.lines()
    assert "step 0  eval_loss 2.5" in lines
    assert "loss=1.5" in [line for line in lines if line.startswith("train")][-1]


def test_progress_is_lines_a_table_or_a_bar(monkeypatch):
    """By the arguments and by where the script runs."""

    class Table:
        pass

    assert progress_callback(quiet=True) is compat.PrinterCallback
    assert progress_callback(quiet=False) is ProgressBar
    monkeypatch.setattr(compat, "is_in_notebook", lambda: True)
    monkeypatch.setattr(compat, "notebook_progress", lambda: Table)
    assert progress_callback(quiet=False) is Table
    assert progress_callback(quiet=True) is compat.PrinterCallback


def test_the_table_of_a_notebook_follows_a_run(tmp_path):
    """A contract: transformers' callback needs nothing of our arguments that they have not."""
    pytest.importorskip("IPython")
    callback = compat.notebook_progress()()
    args = TrainingArguments(str(tmp_path), eval_strategy="epoch")
    state = compat.TrainerState(max_steps=2, num_train_epochs=1, epoch=0.5, global_step=1)
    control = compat.TrainerControl()
    callback.on_train_begin(args, state, control)
    callback.on_step_end(args, state, control)
    callback.on_log(args, state, control, logs={"loss": 1.0})
    callback.on_prediction_step(args, state, control, eval_dataloader=[1])
    callback.on_evaluate(args, state, control, metrics={"eval_loss": 2.0, "epoch": 1})
    callback.on_train_end(args, state, control)
    assert callback.training_tracker is None
