"""The trackers that a run reports to, TensorBoard's folder, log levels."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from dstrain.arguments import TrainingArguments
from dstrain.core.errors import ConfigError
from dstrain.reporting import (
    compat,
    set_tensorboard_folder,
    tracker_callbacks,
)


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
    from dstrain.reporting.trackers import _without_credentials

    sent = []

    class Tracker:
        def setup(self, args, state):
            sent.append(dict(vars(args)))
            args.learning_rate = 0.5

    config = {"comet": {"api_key": "marked"}}
    args = TrainingArguments("out", hub_token="marked", deepspeed=config)
    tracker = _without_credentials(Tracker)
    assert tracker.__name__ == "Tracker"
    tracker().setup(args, None)
    assert "marked" not in str(sent)
    assert sent[0]["hub_token"] == "<HUB_TOKEN>"
    assert (args.hub_token, args.deepspeed, args.learning_rate) == ("marked", config, 0.5)
