"""Signals to each process of a training: it saves and ends, and nobody is left behind."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.cli.corpus import flags, write_corpus
from tests.launch import ROOT
from tests.processes import Training, deepspeed, write_script

PREEMPTED = 75
END_SECONDS = 90.0  # for machines that do other things too

DRIVER = """
set -euo pipefail
source "{root}/launch/setup.sh"
dstrain_run_job "$@"
"""


def begun(training: Training) -> bool:
    """Tell whether both ranks of the script have trained."""
    return min(training.step(0), training.step(1)) >= 2


def logged(training: Training) -> bool:
    """Tell whether the command has trained."""
    return re.search(r"^(\r.*)?step [2-9]", training.text(), re.MULTILINE) is not None


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the committed checkpoints."""
    return [int(p.parent.name.split("-")[1]) for p in folder.glob("out/checkpoint-*/manifest.json")]


def send(number: int, target: str, training: Training) -> None:
    """Send a signal to a part of a training.

    Args:
        number: the signal.
        target: "first" is the process that was started, "group" its process group, "all" every
            process of the session, as a scheduler does; else a word of the command line of the one
            process, beside the first, that is meant.
        training: which runs.
    """
    first = training.process.pid
    if target == "group":
        os.killpg(first, number)
        return
    if target == "first":
        pids = [first]
    elif target == "all":
        pids = training.members()
    else:
        (pid,) = (p for p in training.find(target) if p != first)
        pids = [pid]
    for pid in pids:
        os.kill(pid, number)


# --- deepspeed by itself --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "number"),
    [
        ("first", signal.SIGTERM),
        ("first", signal.SIGUSR1),
        ("deepspeed.launcher.launch", signal.SIGKILL),
        ("group", signal.SIGINT),
        ("group", signal.SIGHUP),
    ],
)
def test_what_ends_deepspeed_lets_the_ranks_save_and_leaves_none_behind(tmp_path, target, number):
    """The status is DeepSpeed's, which forgets that of ranks when it is sent a signal itself."""
    path = write_script(tmp_path, max_steps=10_000, use_cpu=True, zero_stage=2)
    with Training(deepspeed(path), tmp_path) as training:
        training.wait_for(lambda: begun(training))
        send(number, target, training)
        training.wait_for_end(END_SECONDS)
        assert len(saved_steps(tmp_path)) == 1, training.text()
        assert not (tmp_path / "done-0").exists()
        if number != signal.SIGINT:  # of which DeepSpeed's front makes a traceback
            assert "Traceback" not in training.text()


def test_a_front_that_dies_while_the_data_is_prepared_leaves_no_rank_behind(tmp_path):
    """No Trainer has been made by then, and the front is no longer among the processes above."""
    path = write_script(tmp_path, max_steps=10_000, use_cpu=True)
    preparing = "import dstrain; dstrain.TrainingArguments; print('prepares', flush=True)\n"
    wait = "import time; time.sleep(600)\n"
    path.write_text(preparing + wait + path.read_text())
    with Training(deepspeed(path), tmp_path) as training:
        training.wait_for(lambda: training.text().count("prepares") == 2)
        training.process.kill()
        training.wait_for_end(30)
        assert "which started this rank" in training.text()


# --- the scripts of launch/ -----------------------------------------------------------------------


def command(folder: Path, **given: object) -> list[str]:
    """Return the command that `launch/quickstart.sh` runs in the end, for a tiny model."""
    driver = folder / "driver.sh"
    driver.write_text(DRIVER.format(root=ROOT))
    words = flags(
        "out", train_file=write_corpus(folder / "corpus"), max_steps=100_000, save_strategy="no",
        **given,
    )  # fmt: skip
    words = deepspeed("--no_local_rank", "--module", "dstrain", "train", "causal-lm", *words)
    return ["bash", str(driver), *words]


@pytest.mark.parametrize(
    ("target", "number"),
    [
        ("first", signal.SIGUSR1),
        ("first", signal.SIGINT),
        ("all", signal.SIGTERM),
        ("bin/deepspeed", signal.SIGKILL),
        ("deepspeed.launcher.launch", signal.SIGKILL),
        ("deepspeed.launcher.launch", signal.SIGTERM),
    ],
)
def test_the_scripts_of_launch_end_with_75_after_a_save(tmp_path, target, number):
    with Training(command(tmp_path), tmp_path) as training:
        training.wait_for(lambda: logged(training))
        send(number, target, training)
        assert training.wait_for_end(END_SECONDS) == PREEMPTED, training.text()
        assert len(saved_steps(tmp_path)) == 1, training.text()


def test_a_script_that_is_killed_leaves_no_rank_behind(tmp_path):
    with Training(command(tmp_path), tmp_path) as training:
        training.wait_for(lambda: logged(training))
        training.process.kill()
        training.wait_for_end(END_SECONDS)
        assert len(saved_steps(tmp_path)) == 1, training.text()


def test_a_signal_before_there_is_anything_to_save_ends_a_script_by_that_signal(tmp_path):
    with Training(command(tmp_path), tmp_path) as training:
        training.wait_for(lambda: training.find("deepspeed.launcher.launch"))
        os.kill(training.process.pid, signal.SIGTERM)
        assert training.wait_for_end(END_SECONDS) == 128 + signal.SIGTERM, training.text()
        assert not saved_steps(tmp_path)


# --- what is no launcher --------------------------------------------------------------------------


def test_a_shell_that_ends_is_no_launcher(tmp_path):
    """``python script.py &``, and the terminal is left: the parent is then another process."""
    path = write_script(tmp_path, max_steps=12, use_cpu=True, pause=0.3)
    shell = ["bash", "-c", f"{sys.executable} {path} & sleep 0.1"]
    with Training(shell, tmp_path) as training:
        training.wait_for(lambda: training.process.poll() is not None)
        training.wait_for(lambda: training.step() > 0)
        time.sleep(1.5)
        training.wait_for_end()
        assert (tmp_path / "done-0").exists(), training.text()
        assert not saved_steps(tmp_path)
