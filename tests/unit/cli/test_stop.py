"""A run that a signal ended early, as the command reports it."""

from __future__ import annotations

import signal

import pytest

from dstrain.cli import main as command
from dstrain.core.stop import PREEMPTED, Preempted


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_command_says_how_to_go_on_and_returns_the_status(rank, monkeypatch, capsys):
    """A scheduler's script tells it from success and from failure; one rank speaks."""
    from dstrain.cli import train

    def run(words):
        raise Preempted("rank 1 was sent SIGTERM: training has ended early and is saved")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(train, "run", run)
    assert command.main(["train", "causal-lm"]) == PREEMPTED == 75
    said = capsys.readouterr().err
    if rank == "0":
        assert "rank 1 was sent SIGTERM" in said
        assert "--resume_from_checkpoint auto" in said
    else:
        assert said == ""


def test_what_has_nothing_saved_does_not_say_how_to_go_on(monkeypatch, capsys):
    from dstrain.cli import train

    def run(words):
        raise Preempted("rank 1 was sent SIGUSR1: nothing is saved", unsaved=signal.SIGUSR1)

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(train, "run", run)
    assert command.main(["train", "causal-lm"]) == 128 + signal.SIGUSR1
    said = capsys.readouterr().err
    assert "nothing is saved" in said
    assert "--resume_from_checkpoint" not in said
