"""A signal during a hyperparameter search: all ranks end it, and what was cut does not count."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests import wandb_file
from tests.distributed.test_preemption import callback, send
from tests.distributed.test_search import make_searcher, on_all_ranks, small_model

optuna = pytest.importorskip("optuna")

CUT = {
    "in the first trial": (0, "on_step_begin"),
    "in the second trial": (1, "on_step_begin"),
    "in an evaluation after training": (1, "on_prediction_step"),
    "before the first step": (1, "on_train_begin"),
}


def acting_in(trial: str, event: str, act: Any) -> Any:
    """Make a callback that calls ``act`` at the first such event of a trial."""
    from transformers import TrainerCallback

    done: list[str] = []

    def at_event(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.trial_name == trial and not done:
            done.append(event)
            act()

    return type("Acting", (TrainerCallback,), {event: at_event})()


def space(trial: Any) -> dict[str, Any]:
    """Search a learning rate."""
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)}


def states(folder: Path) -> list[tuple[str, bool]]:
    """Return the state of each trial of the study, and whether it has a value."""
    study = optuna.load_study(study_name="cut", storage=f"sqlite:///{folder}/study.db")
    return [(trial.state.name, trial.value is not None) for trial in study.trials]


def search(trainer: Any, folder: Path, **more: Any) -> Any:
    """Search with a study whose trials can be looked at afterwards."""
    return trainer.hyperparameter_search(
        space, backend="optuna", n_trials=3, study_name="cut",
        storage=f"sqlite:///{folder}/study.db", **more,
    )  # fmt: skip


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("case", CUT)
def test_the_trial_that_was_cut_does_not_count_and_no_other_begins(
    case: str, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``catch`` does not go on after it, as it would after a failure."""
    from dstrain.training import preemption

    monkeypatch.setattr(preemption, "_EXCHANGE_SECONDS", 0.0)
    number, event = CUT[case]
    before = signal.getsignal(signal.SIGTERM)
    act = send(signal.SIGTERM, here=rank == 1)
    trainer = make_searcher(
        tmp_path, small_model, preemption="return",
        callbacks=[acting_in(f"run-{number}", event, act)],
        train=16, evaluation=16, per_device_eval_batch_size=1,
    )  # fmt: skip
    best = search(trainer, tmp_path, catch=(Exception,))
    assert on_all_ranks(best) == [best] * 2
    assert trainer.preempted
    assert trainer.args.output_dir == str(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    if number == 0:
        assert best is None
    else:
        assert best.run_id == "0"
    if rank == 0:
        assert states(tmp_path) == [("COMPLETE", True)] * number + [("FAIL", False)]
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("here", [0, 1])
def test_a_signal_between_two_trials_ends_all_ranks_alike(
    here: int, tmp_path: Path, rank: int
) -> None:
    """With the status that says to try again, and no trial left running in the study."""

    def model_init(trial: Any) -> Any:
        return small_model()

    def objective(metrics: dict[str, float]) -> float:  # after the evaluation, on the main rank
        return metrics["eval_loss"]

    trainer = make_searcher(tmp_path, model_init)
    spaces: list[int] = []

    def signalled_space(trial: Any) -> dict[str, Any]:
        spaces.append(trial.number)
        if trial.number == 1 and rank == here:
            os.kill(os.getpid(), signal.SIGTERM)
        return space(trial)

    with pytest.raises(SystemExit) as caught:
        trainer.hyperparameter_search(
            signalled_space, objective, backend="optuna", n_trials=3, study_name="cut",
            storage=f"sqlite:///{tmp_path}/study.db",
        )  # fmt: skip
    assert caught.value.code == 75
    assert f"rank {here} was sent SIGTERM" in caught.value.message
    assert "1 of its trials complete" in caught.value.message
    assert 2 not in spaces
    if rank == 0:
        assert states(tmp_path) == [("COMPLETE", True), ("FAIL", False)]
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
def test_a_signal_after_a_trial_that_is_complete_keeps_it(tmp_path: Path, rank: int) -> None:
    def objective(metrics: dict[str, float]) -> float:  # on the main rank, when a trial is over
        os.kill(os.getpid(), signal.SIGTERM)
        return metrics["eval_loss"]

    trainer = make_searcher(tmp_path, small_model, preemption="return")
    best = search(trainer, tmp_path, compute_objective=objective)
    assert trainer.preempted
    assert best.run_id == "0"
    if rank == 0:
        assert states(tmp_path) == [("COMPLETE", True)]
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
def test_with_status_75_the_cut_trial_is_a_failed_one_of_the_study(
    tmp_path: Path, rank: int
) -> None:
    act = send(signal.SIGTERM, here=rank == 0)
    trainer = make_searcher(tmp_path, small_model, callbacks=[callback("on_step_begin", 1, act)])
    with pytest.raises(SystemExit) as caught:
        search(trainer, tmp_path)
    assert caught.value.code == 75
    if rank == 0:
        assert states(tmp_path) == [("FAIL", False)]
    trainer.close()


@pytest.mark.ranks(2, timeout=240)
@pytest.mark.parametrize("number", [0, 1])
def test_a_signal_ends_the_agent_of_wandb(
    number: int, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent is W&B's own, which trains in a thread; its server cannot be here."""
    import wandb
    from wandb.agents import pyagent

    wandb_file.go_offline(tmp_path, monkeypatch)
    begun: list[str] = []

    def setup(agent: Any) -> None:
        agent._init()
        agent._sweep_id = "a-sweep"
        for name in ("r0", "r1", "r2"):
            config = {"learning_rate": {"value": 0.1}}
            agent._queue.put(pyagent.Job({"type": "run", "run_id": name, "args": config}))
            agent._run_status[name] = pyagent.RunStatus.QUEUED

    monkeypatch.setattr(wandb, "Api", object)
    monkeypatch.setattr(wandb, "agent", pyagent.pyagent)  # without asking for a key first
    monkeypatch.setattr(pyagent.Agent, "_setup", setup)
    monkeypatch.setattr(pyagent.Agent, "HEARTBEAT_SLEEP_SECONDS", 0.05)
    monkeypatch.setattr(pyagent.Agent, "_heartbeat_commands", lambda agent, status: [])

    def model_init(trial: Any) -> Any:
        if trial is not None:
            begun.append(trial)
        return small_model()

    act = send(signal.SIGTERM, here=rank == 0)
    acting = acting_in(f"run-r{number}", "on_step_begin", act)
    trainer = make_searcher(
        tmp_path / "out", model_init, callbacks=[acting], preemption="return"
    )  # fmt: skip
    best = trainer.hyperparameter_search(
        lambda trial: {}, backend="wandb", n_trials=3, sweep_id="a-sweep"
    )
    assert trainer.preempted
    assert on_all_ranks(best) == [best] * 2
    assert len(begun) == number + 1
    assert (best is None) == (number == 0)
    assert "WANDB_AGENT_DISABLE_FLAPPING" not in os.environ
    trainer.close()
