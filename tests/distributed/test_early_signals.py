"""A signal before a run's first step: nothing is saved, and the exit status says so."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.runs import make_trainer
from tests.distributed.test_preemption import callback, send
from tests.distributed.test_signals import DRIVER, saved_steps
from tests.launch import ROOT
from tests.processes import Training, deepspeed, write_script

EARLY: list[tuple[str, dict[str, Any]]] = [
    ("on_train_begin", {}),
    ("on_prediction_step", {"eval_on_start": True, "per_device_eval_batch_size": 1}),
]


@pytest.mark.ranks(2, timeout=300)
@pytest.mark.parametrize(("event", "settings"), EARLY, ids=str)
def test_the_status_is_that_of_the_signal_where_nothing_is_saved(
    event: str, settings: dict[str, Any], tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On all ranks; 75 would have a scheduler look for a checkpoint."""
    from dstrain.training import preemption

    monkeypatch.setattr(preemption, "_EXCHANGE_SECONDS", 0.0)
    act = send(signal.SIGUSR1, here=rank == 1)
    trainer = make_trainer(
        tmp_path, callbacks=[callback(event, 0, act)], evaluation=16, **settings
    )  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == 128 + signal.SIGUSR1
    assert "rank 1 was sent SIGUSR1" in caught.value.message
    assert "nothing is saved" in caught.value.message
    assert trainer.preempted
    assert not list(tmp_path.glob("checkpoint-*"))
    trainer.close()


@pytest.mark.ranks(2, timeout=300)
def test_a_run_that_goes_on_has_the_checkpoint_that_it_came_from(tmp_path: Path, rank: int) -> None:
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.close()
    act = send(signal.SIGTERM, here=rank == 0)
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[callback("on_train_begin", 2, act)])
    with pytest.raises(SystemExit) as caught:
        trainer.train(resume_from_checkpoint=True)
    assert caught.value.code == 75
    assert "is saved" in caught.value.message
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    trainer.close()
    trainer = make_trainer(tmp_path, max_steps=4)
    assert trainer.train(resume_from_checkpoint="auto").global_step == 4
    trainer.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_script_of_launch_ends_by_the_signal_before_the_first_step(
    tmp_path: Path, number: int
) -> None:
    """It passes SIGTERM on, whatever it was sent; a scheduler knows the signal that it sent."""
    path = write_script(tmp_path, max_steps=10_000, use_cpu=True, zero_stage=2)
    waits = "    def on_train_begin(self, *args, **kwargs):\n"
    waits += "        print('begins', flush=True)\n        time.sleep(4)\n\n"
    steps = "    def on_step_end"
    path.write_text(path.read_text().replace(steps, waits + steps))
    driver = tmp_path / "driver.sh"
    driver.write_text(DRIVER.format(root=ROOT))
    with Training(["bash", str(driver), *deepspeed(path)], tmp_path) as training:
        training.wait_for(lambda: training.text().count("begins") == 2)
        os.kill(training.process.pid, number)
        assert training.wait_for_end(90.0) == 128 + number, training.text()
        assert "there is nothing to save" in training.text()
        assert training.step() == 0
        assert not saved_steps(tmp_path)
