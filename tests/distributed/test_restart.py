"""Runs that a launcher starts, and that others end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dstrain.checkpoint import committed, verify
from dstrain.core.stop import PREEMPTED
from tests.distributed.runs import history, make_trainer
from tests.launch import ROOT, free_port, launch, quiet_environment, remove_shared_memory

SETTINGS = {"train": 36, "num_train_epochs": 2, "save_strategy": "steps", "evaluation": 0}


def job(folder: Path, resume: str = "", *, ranks: int, **settings: Any) -> dict[str, Any]:
    """Run ``resume_job`` to its end; what it wrote."""
    arguments = ["--no_local_rank", "--module", "tests.distributed.resume_job", str(folder)]
    done = launch(
        [*arguments, json.dumps({**SETTINGS, **settings}), resume],
        num_gpus=ranks,
        timeout=240,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "outcome.json").read_text())


@pytest.mark.ranks(1)
def test_another_global_batch_goes_on_at_the_right_sample(tmp_path: Path) -> None:
    """36 samples an epoch: 4 steps of 6, then batches of 4 for the 12 + 36 that are left."""
    first = make_trainer(tmp_path, **SETTINGS, stage=1, save_steps=4, per_device_train_batch_size=6)
    first.train()
    first.close()
    resumed = make_trainer(
        tmp_path / "again", **SETTINGS, stage=1, save_steps=100, per_device_train_batch_size=4
    )
    resumed.train(str(tmp_path / "checkpoint-4"))
    resumed.close()
    assert resumed.state.global_step == 4 + 3 + 9
    epochs = [e["epoch"] for e in history(resumed) if "loss" in e]
    assert epochs[4] == pytest.approx(28 / 36, abs=1e-3)
    assert epochs[-1] == 2.0


@pytest.mark.slow
def test_a_scheduler_that_ends_the_job_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    """SIGTERM to the script, which passes it on to the ranks."""
    settings = {
        **SETTINGS, "train": 600, "num_train_epochs": 1, "stage": 2, "save_steps": 40,
        "dataloader_num_workers": 1,
    }  # fmt: skip
    port = free_port()
    command = [
        *("bash", "-c", 'source "$1"; shift; dstrain_run_job "$@"', "job"),
        str(ROOT / "launch/setup.sh"),
        *(sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"),
        *("--master_port", str(port), "--no_local_rank"),
        *("--module", "tests.distributed.resume_job"),
        *(str(tmp_path), json.dumps(settings), ""),
    ]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command, env=quiet_environment(), cwd=ROOT, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and not committed(tmp_path):
            assert time.monotonic() < deadline, "the job never saved"
            time.sleep(0.02)
        process.terminate()
        assert process.wait(60) == PREEMPTED, (tmp_path / "log").read_text()
        left = subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, text=True)
        assert left.stdout == "", "nothing of the job is left behind"
    finally:
        # The job has a process group of its own, in the session that the script leads.
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
        process.wait()
        remove_shared_memory(port)
    said = (tmp_path / "log").read_text()
    assert "was sent SIGTERM: training ends after step" in said, said
    last = committed(tmp_path)[-1]
    assert last.step % 40 != 0, "it saved when it was told to, not when it was due"
    assert verify(last.folder)[1] == []
