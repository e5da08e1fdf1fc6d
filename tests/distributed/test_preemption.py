"""A signal on one rank: all stop after the same step, save, and a later run goes on from there."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.resumed_runs import (
    EPOCH,
    Stream,
    assert_same,
    masking_collate,
    noisy_llama,
    run,
)
from tests.distributed.runs import make_trainer, whole_weights


@pytest.fixture(autouse=True)
def _asks_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask after every step: those of these runs are too short for twice a second."""
    from dstrain.training import preemption

    monkeypatch.setattr(preemption, "_EXCHANGE_SECONDS", 0.0)


def callback(event: str, at: int, act: Any) -> Any:
    """Return a callback that acts once, at an event of step ``at``."""
    from transformers import TrainerCallback

    class Acting(TrainerCallback):
        done = False

    def method(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == at and not self.done:
            self.done = True
            act()

    setattr(Acting, event, method)
    return Acting


def send(number: int, *, here: bool, children: bool = False) -> Any:
    """Send a signal to this process and its loader processes, as a scheduler does."""

    def act() -> None:
        import multiprocessing

        if not here:
            return
        for child in multiprocessing.active_children() if children else ():
            os.kill(child.pid, number)
        os.kill(os.getpid(), number)

    return act


CASES: list[tuple[int, int, dict[str, Any]]] = [
    (2, 3, {"lr_scheduler_type": "cosine"}),
    (3, 3, {"bf16": True, "gradient_accumulation_steps": 2, "num_train_epochs": 4}),
    # Step 6, after which it stops, ends an epoch.
    (2, 5, {"logging_strategy": "epoch", "eval_strategy": "epoch"}),
    (1, 3, {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 2}),
    (2, 3, {"data": "stream", "max_steps": 12}),
    (2, 3, {"dataloader_num_workers": 1}),
]


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize(("stage", "at", "settings"), CASES, ids=str)
def test_the_run_that_goes_on_is_the_run_that_was_never_stopped(
    stage: int, at: int, settings: dict[str, Any], tmp_path: Path, rank: int
) -> None:
    """With a checkpoint of the very step, whatever save_strategy says."""
    from dstrain import Trainer
    from dstrain.checkpoint import committed

    settings = {"save_strategy": "steps", "save_steps": 100, "stage": stage, **EPOCH, **settings}
    if settings.get("data") == "stream":

        class Masking(Trainer):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "data_collator": masking_collate})

        settings |= {"cls": Masking, "data": Stream(22)}
    whole = run(tmp_path / "whole", **settings)
    workers = "dataloader_num_workers" in settings
    act = send(signal.SIGTERM, here=rank == 1, children=workers)
    stopped = {**settings, "callbacks": [callback("on_step_begin", at, act)]}
    if settings["save_steps"] == 100:
        stopped["save_strategy"] = "no"
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(
        tmp_path / "again", model=noisy_llama(), preemption="return", **stopped
    )  # fmt: skip
    trainer.train()
    assert trainer.preempted
    assert trainer.state.global_step == at + 1
    assert signal.getsignal(signal.SIGTERM) is before
    trainer.close()
    assert committed(tmp_path / "again")[-1].step == at + 1
    assert_same(run(tmp_path / "again", resume=True, **settings), whole)


LAST: list[tuple[str, dict[str, Any]]] = [
    ("on_step_end", {}),
    ("on_epoch_end", {"num_train_epochs": 1, "max_steps": -1}),
    ("on_evaluate", {"eval_strategy": "steps", "eval_steps": 4}),
    ("on_save", {"save_strategy": "steps", "save_steps": 2}),
    ("on_step_end", {"max_steps": 40}),
]


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize(("event", "settings"), LAST, ids=str)
def test_a_signal_in_the_last_step_loses_nothing(
    event: str, settings: dict[str, Any], tmp_path: Path, rank: int
) -> None:
    """What was trained is saved; the run that goes on takes no step, even if a callback ended it.

    The signal comes when the ranks have told each other of signals for the last time in that step.
    """
    from transformers import TrainerCallback

    from dstrain.checkpoint import committed

    class Stopping(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step == 4

    settings = {"stage": 2, **EPOCH, "save_strategy": "no", "max_steps": 4, **settings}
    early = [Stopping()] if settings["max_steps"] == 40 else []

    def train(folder: str, *, resume: bool = False, callbacks: Any = (), **more: Any) -> Any:
        trainer = make_trainer(
            tmp_path / folder, model=noisy_llama(), callbacks=[*callbacks], **settings, **more
        )
        trainer.train(resume)
        outcome = whole_weights(trainer), trainer.state.global_step, trainer.preempted
        trainer.close()
        return outcome

    weights, steps, _ = train("whole", callbacks=early)
    act = send(signal.SIGTERM, here=rank == 1)
    acting = callback(event, steps, act)()
    assert train("again", callbacks=[*early, acting], preemption="return")[2]
    assert committed(tmp_path / "again")[-1].step == steps
    resumed, its_steps, _ = train("again", resume=True)
    assert its_steps == steps
    for name, value in weights.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.ranks(2, timeout=300)
def test_the_process_ends_with_the_documented_status(tmp_path: Path, rank: int) -> None:
    """A SystemExit on every rank, after the records of the run are written."""
    from dstrain.core.stop import PREEMPTED

    act = send(signal.SIGUSR1, here=rank == 0)
    trainer = make_trainer(
        tmp_path, callbacks=[callback("on_step_begin", 1, act)], load_best_model_at_end=True,
        eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1,
    )  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == PREEMPTED == 75
    assert "rank 0 was sent SIGUSR1" in caught.value.message
    assert (tmp_path / "trainer_state.json").exists()
    assert trainer.is_in_train is False
    trainer.close()


@pytest.mark.ranks(2, timeout=300)
def test_signals_that_are_not_ours(tmp_path: Path, rank: int) -> None:
    """Ignored on request; one that comes when training is over is given back."""
    got: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: got.append(number))
    try:
        for event, settings in (
            ("on_step_begin", {"preemption": "ignore"}),
            ("on_train_end", {}),
        ):
            act = send(signal.SIGUSR1, here=rank == 1)
            at = 1 if event == "on_step_begin" else 3
            trainer = make_trainer(
                tmp_path, max_steps=3, callbacks=[callback(event, at, act)], **settings
            )
            assert trainer.train().global_step == 3
            assert not trainer.preempted
            assert got == ([signal.SIGUSR1] if rank == 1 else []), event
            got.clear()
            trainer.close()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.ranks(2, timeout=300)
def test_a_signal_before_the_first_step_ends_a_run_that_has_nothing_to_save(
    tmp_path: Path, rank: int
) -> None:
    """It came while the engine was built."""
    act = send(signal.SIGTERM, here=rank == 0)
    trainer = make_trainer(
        tmp_path, callbacks=[callback("on_train_begin", 0, act)], preemption="return"
    )
    assert trainer.train().global_step == 0
    assert trainer.preempted
    assert not list(tmp_path.glob("checkpoint-*"))
    trainer.close()


@pytest.mark.ranks(2, timeout=300)
def test_a_last_save_that_fails_is_an_error(
    tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 75 would say that the run can go on from here."""
    from dstrain.checkpoint import capture
    from dstrain.core.errors import CheckpointError

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(capture, "write_tensor_file", full)
    act = send(signal.SIGTERM, here=rank == 0)
    trainer = make_trainer(
        tmp_path, callbacks=[callback("on_step_begin", 1, act)], save_failure="continue"
    )
    with pytest.raises(CheckpointError, match="after step 2, which could not be saved"):
        trainer.train()
    trainer.close()
