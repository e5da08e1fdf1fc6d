"""Runs that start again as new processes: on other numbers of ranks, and after being killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dstrain.checkpoint import committed, verify
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


@pytest.mark.slow
def test_any_number_of_ranks_goes_on_with_the_same_samples(tmp_path: Path) -> None:
    """A global batch of 6, 12 steps; the losses are those of the run that never stopped."""
    whole = job(tmp_path / "three", ranks=3, stage=3, save_steps=4)
    start = str(tmp_path / "three/checkpoint-4")
    for ranks, settings in (
        (1, {"stage": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}),
        (2, {"stage": 1, "per_device_train_batch_size": 3}),
    ):
        folder = tmp_path / f"{ranks}-{settings['stage']}"
        resumed = job(folder, start, ranks=ranks, save_steps=4, **settings)
        assert resumed["losses"] == pytest.approx(whole["losses"], rel=2e-5), (ranks, settings)
    back = str(tmp_path / "1-2/checkpoint-8")
    again = job(tmp_path / "back", back, ranks=3, stage=2, save_steps=4)
    assert again["losses"] == pytest.approx(whole["losses"], rel=2e-5)


@pytest.mark.slow
def test_another_global_batch_goes_on_at_the_right_sample(tmp_path: Path) -> None:
    """36 samples an epoch: 4 steps of 6, then batches of 4 for the 12 + 36 that are left."""
    job(tmp_path, ranks=1, stage=1, save_steps=4, per_device_train_batch_size=6)
    resumed = job(
        tmp_path / "again",
        str(tmp_path / "checkpoint-4"),
        ranks=1,
        stage=1,
        save_steps=100,
        per_device_train_batch_size=4,
    )
    assert resumed["step"] == 4 + 3 + 9
    epochs = [e["epoch"] for e in resumed["history"] if "loss" in e]
    assert epochs[4] == pytest.approx(28 / 36, abs=1e-3)
    assert epochs[-1] == 2.0


def killed(folder: Path, seconds: float, settings: dict[str, Any]) -> bool:
    """Start the job with ``auto`` and kill all of it after that time; whether it had ended."""
    port = free_port()
    command = [
        *(sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"),
        *("--master_port", str(port), "--no_local_rank"),
        *("--module", "tests.distributed.resume_job"),
        *(str(folder), json.dumps(settings), "auto"),
    ]
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen(
            command, env=quiet_environment(), cwd=ROOT, stdout=nowhere, stderr=nowhere,
            start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and not list(folder.glob("*checkpoint-*")):
            assert time.monotonic() < deadline, "the job never saved"
            time.sleep(0.05)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        return process.poll() is not None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        remove_shared_memory(port)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_never_was(tmp_path: Path) -> None:
    """Seeded random moments while it saves at every step and rotates."""
    settings = {**SETTINGS, "stage": 2, "save_steps": 1, "save_total_limit": 2, "bf16": True}
    whole = job(tmp_path / "whole", ranks=2, **settings)
    draw = random.Random(7)
    folder = tmp_path / "killed"
    newest = 0
    for _ in range(4):
        over = killed(folder, draw.uniform(0.0, 0.5), settings)
        found = committed(folder)
        if found:
            assert verify(found[-1].folder)[1] == []
            assert found[-1].step >= newest
            newest = found[-1].step
        if over:
            break
    resumed = job(folder, "auto", ranks=2, **settings)
    assert resumed["weights"] == whole["weights"]
    assert resumed["history"][:-1] == whole["history"][:-1]
