"""What a run shows: log lines, the progress bar, the loss curve, and the trackers it reports to."""

from __future__ import annotations

import io
import logging
import math
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.core.errors import ConfigError
from dstrain.reporting import (
    compat,
    progress_callback,
    save_loss_curve,
    set_tensorboard_folder,
    tracker_callbacks,
)
from dstrain.reporting.progress import ProgressBar, log_line

PNG = b"\x89PNG\r\n\x1a\n"


# --- log lines -----------------------------------------------------------------------------------


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


# --- loss curve ----------------------------------------------------------------------------------

HISTORY = [
    {"step": 0, "eval_loss": 9.0},
    {"step": 10, "loss": 8.0, "learning_rate": 1e-3},
    {"step": 20, "loss": 6.0},
    {"step": 20, "eval_loss": 6.5},
    {"step": 20, "train_runtime": 3.0},
    {"step": 20, "eval_loss": 6.25},
]


@pytest.mark.parametrize(
    "history",
    [
        HISTORY,
        HISTORY[:1],
        [{"step": 1, "loss": math.nan}, {"step": 1, "eval_loss": math.nan}],
    ],
    ids=["both", "evaluation only", "nan"],
)
def test_a_loss_curve_is_a_picture(tmp_path, history):
    file = tmp_path / "curve.png"
    assert save_loss_curve(history, file) is True
    assert file.read_bytes().startswith(PNG)


@pytest.mark.parametrize("history", [[], [{"step": 1, "train_runtime": 3.0}]])
def test_nothing_to_draw_leaves_no_file(tmp_path, history):
    assert save_loss_curve(history, tmp_path / "curve.png") is False
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def drawn(monkeypatch) -> Callable[[list[dict[str, float]]], dict[str, Any]]:
    """Draw a history without writing it; return the lines of the picture by their label."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))

    def draw(history: list[dict[str, float]]) -> dict[str, Any]:
        save_loss_curve(history, Path("curve.png"))
        return {line.get_label(): line for line in figures[-1].axes[0].lines}

    return draw


def test_the_curve_shows_the_logged_points(drawn):
    """Both losses at their steps; of two evaluations at one step the later counts."""
    points = {label: line.get_xydata().tolist() for label, line in drawn(HISTORY).items()}
    assert points == {
        "training": [[10.0, 8.0], [20.0, 6.0]],
        "evaluation": [[0.0, 9.0], [20.0, 6.25]],
    }


def test_a_single_point_is_visible(drawn):
    """A line through one point is none; a short run logs once."""
    assert drawn(HISTORY[1:2])["training"].get_marker() == "o"
    assert drawn(HISTORY)["training"].get_marker() in (None, "None")


# --- trackers ------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch) -> list[str]:
    """Give the list of trackers that count as installed, for tests to change; W&B has no key."""
    names = ["tensorboard", "wandb"]
    monkeypatch.setattr(compat, "get_available_reporting_integrations", lambda: list(names))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    return names


def names_of(report_to: list[str] | None) -> list[str]:
    return [callback.__name__ for callback in tracker_callbacks(report_to)]


@pytest.mark.parametrize("report_to", [["none"], []])
def test_none_takes_no_tracker(installed, report_to):
    """An empty list is what transformers makes of "none"."""
    assert tracker_callbacks(report_to) == []


@pytest.mark.parametrize("report_to", [None, ["all"]])
def test_all_takes_what_is_installed(installed, monkeypatch, report_to):
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert names_of(report_to) == ["TensorBoardCallback", "WandbCallback"]
    installed.remove("wandb")
    assert names_of(report_to) == ["TensorBoardCallback"]


@pytest.mark.parametrize("report_to", [None, ["all"]])
def test_all_leaves_wandb_out_where_it_would_stop_and_ask(installed, caplog, report_to):
    """A job without a terminal would wait for a key for ever."""
    with caplog.at_level(logging.INFO, logger="dstrain"):
        assert names_of(report_to) == ["TensorBoardCallback"]
    assert "W&B is installed but not set up" in caplog.text


@pytest.mark.parametrize("mode", ["offline", "disabled", "dryrun", "OFFLINE"])
def test_all_takes_wandb_in_a_mode_that_needs_no_key(installed, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    assert "WandbCallback" in names_of(None)


def test_all_takes_wandb_after_wandb_login(installed, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password x\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert "WandbCallback" in names_of(None)


def test_a_named_tracker_is_taken_alone(installed):
    assert names_of(["tensorboard"]) == ["TensorBoardCallback"]
    assert names_of(["wandb"]) == ["WandbCallback"], "named, so the user wants to be asked"


def test_no_tracker_installed_is_no_error_with_all(installed):
    installed.clear()
    assert tracker_callbacks(None) == []


def test_unknown_trackers_are_refused_all_at_once_with_the_nearest(installed):
    with pytest.raises(ConfigError) as caught:
        tracker_callbacks(["tensorbord", "zzz", "wandb"])
    texts = [str(problem) for problem in caught.value.problems]
    assert len(texts) == 2
    assert "did you mean 'tensorboard'?" in texts[0]
    assert "report_to='zzz'" in texts[1]


@pytest.mark.parametrize(
    ("name", "package"),
    [("wandb", "dstrain[wandb]"), ("tensorboard", "dstrain[tensorboard]"), ("mlflow", "mlflow")],
)
def test_a_named_tracker_that_is_not_installed_is_refused_with_the_command(
    installed, name, package
):
    """Before the model is loaded, and not by an ImportError in the middle of a constructor."""
    installed.clear()
    with pytest.raises(ConfigError, match="it is not installed") as caught:
        tracker_callbacks([name])
    assert f"pip install {package}" in str(caught.value)


@pytest.mark.parametrize("name", ["flyte", "azure_ml"])
def test_trackers_that_cannot_be_detected_are_given_the_chance(installed, name):
    assert len(tracker_callbacks([name])) == 1


def test_every_documented_tracker_is_known(installed, monkeypatch):
    """Those of the reference document, by its names; each is built by transformers' callback."""
    documented = [
        *("azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte"),
        *("mlflow", "neptune", "tensorboard", "wandb"),
    ]
    installed[:] = documented
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert len(tracker_callbacks(documented)) == len(documented)


def test_dvclive_is_not_left_to_save_the_model_on_its_own(installed, monkeypatch):
    """Its callback builds transformers' Trainer on rank 0: an empty model at stage 3."""
    installed.append("dvclive")
    monkeypatch.setenv("HF_DVCLIVE_LOG_MODEL", "true")
    with pytest.raises(ConfigError, match="HF_DVCLIVE_LOG_MODEL"):
        tracker_callbacks(["dvclive"])
    monkeypatch.setenv("HF_DVCLIVE_LOG_MODEL", "all")
    assert len(tracker_callbacks(["dvclive"])) == 1


def test_wandb_uploads_models_as_this_trainer_writes_them(installed):
    """A contract: transformers' callback has what ours relies on."""
    pytest.importorskip("wandb")
    from dstrain.reporting.wandb_tracker import WandbCallback

    (ours,) = tracker_callbacks(["wandb"])
    assert issubclass(ours, WandbCallback)
    callback = ours()
    assert callback._log_model.is_enabled is False
    assert callback._initialized is False
    assert callback.reads_checkpoints is False


# --- progress ------------------------------------------------------------------------------------


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


# --- log levels ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "given", "level"),
    [
        (0, {}, None),
        (0, {"log_level": "error"}, logging.ERROR),
        (1, {}, logging.WARNING),
        (1, {"log_level_replica": "critical", "log_level": "debug"}, logging.CRITICAL),
        (1, {"log_level_replica": "passive"}, None),
    ],
)
def test_transformers_is_as_loud_as_the_arguments_say_of_a_rank(monkeypatch, rank, given, level):
    """Passive leaves the level alone."""
    from transformers.utils import logging as theirs

    from dstrain.trainer.build import _set_level_of_transformers

    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    before = theirs.get_verbosity()
    try:
        theirs.set_verbosity(logging.INFO)
        _set_level_of_transformers(TrainingArguments("out", **given))
        assert theirs.get_verbosity() == (logging.INFO if level is None else level)
    finally:
        theirs.set_verbosity(before)


def test_every_tracker_of_transformers_is_known_by_the_name_it_is_detected_by():
    """A contract with transformers' semi-private tables."""
    assert set(compat.get_available_reporting_integrations()) <= set(compat.INTEGRATION_TO_CALLBACK)


# --- TensorBoard ---------------------------------------------------------------------------------


@pytest.fixture
def tensorboard_variable(monkeypatch) -> str:
    """Give the variable's name, and undo after the test what it sets."""
    name = "TENSORBOARD_LOGGING_DIR"
    monkeypatch.setenv(name, "set before")
    return name


def test_the_tensorboard_folder_is_the_given_one(tensorboard_variable):
    assert set_tensorboard_folder("logs", "out") == "logs"
    assert os.environ[tensorboard_variable] == "logs"


def test_the_tensorboard_folder_is_under_output_dir_by_default(tensorboard_variable):
    """``output_dir/runs/<date>_<host>``, as documented."""
    import socket

    folder = Path(set_tensorboard_folder(None, "out"))
    assert folder.parent == Path("out/runs")
    assert folder.name.endswith(f"_{socket.gethostname()}")
    assert os.environ[tensorboard_variable] == str(folder)


def test_transformers_tensorboard_callback_writes_there(tmp_path, tensorboard_variable):
    """A contract: it reads the variable, and takes our arguments for its text summary."""
    pytest.importorskip("tensorboard")
    set_tensorboard_folder(str(tmp_path / "logs"), "out")
    (callback_class,) = tracker_callbacks(["tensorboard"])
    callback = callback_class()
    args, state = TrainingArguments(str(tmp_path)), compat.TrainerState(is_world_process_zero=True)
    control = compat.TrainerControl()
    callback.on_train_begin(args, state, control)
    callback.on_log(args, state, control, logs={"loss": 1.0})
    callback.on_train_end(args, state, control)
    events = list((tmp_path / "logs").glob("events.out.tfevents.*"))
    assert len(events) == 1
    assert b"train/loss" in events[0].read_bytes()


def test_a_tracker_that_is_sent_the_arguments_themselves_gets_no_credential():
    """As ClearML is; what it changes in them is taken over, masks are not."""
    from dstrain.reporting.trackers import _given_no_credentials

    sent = []

    class Tracker:
        def setup(self, args, state):
            sent.append(dict(vars(args)))
            args.learning_rate = 0.5

    config = {"comet": {"api_key": "marked"}}
    args = TrainingArguments("out", hub_token="marked", deepspeed=config)
    tracker = _given_no_credentials(Tracker)
    assert tracker.__name__ == "Tracker"
    tracker().setup(args, None)
    assert "marked" not in str(sent)
    assert sent[0]["hub_token"] == "<HUB_TOKEN>"
    assert (args.hub_token, args.deepspeed, args.learning_rate) == ("marked", config, 0.5)
