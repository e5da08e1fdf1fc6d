"""`deepspeed ... | head`: the reader of a training's output leaves, and no run is lost for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.corpus import flags, write_corpus
from tests.launch import quiet_environment
from tests.processes import Training, deepspeed, write_script

STEPS = 8


def leave_after_the_first_line(reading: int) -> None:
    """Be ``head -1``."""
    with os.fdopen(reading) as reader:
        assert reader.readline()


@pytest.mark.parametrize(("stage", "settings"), [(2, {"dataloader_num_workers": 1}), (3, {})])
def test_a_script_of_the_python_api_trains_on_and_ends_well(tmp_path, stage, settings):
    """Without bar, where transformers' callback prints; and with prints of loader processes."""
    settings = {"disable_tqdm": stage == 2, **settings}
    path = write_script(tmp_path, max_steps=STEPS, zero_stage=stage, use_cpu=True, **settings)
    reading, writing = os.pipe()
    # At stage 3 nobody reads stderr either, where bars and logs are written.
    both = {"stdout": writing} | ({"stderr": writing} if stage == 3 else {})
    with Training(deepspeed(path), tmp_path, **both) as training:
        os.close(writing)
        leave_after_the_first_line(reading)
        assert training.wait_for_end() == 0, training.text()
        assert training.step(0) == training.step(1) == STEPS
        assert (tmp_path / "done-0").exists()
        assert (tmp_path / "done-1").exists()
        if stage == 2:
            assert training.text().count("nobody reads stdout any more") == 1
        assert "BrokenPipe" not in training.text()


def test_the_command_trains_on_and_saves(tmp_path):
    words = flags(
        "out", train_file=write_corpus(tmp_path / "corpus"), max_steps=STEPS, zero_stage=2,
        save_strategy="steps", save_steps=STEPS,
    )  # fmt: skip
    reading, writing = os.pipe()
    command = deepspeed("--module", "dstrain", "train", "causal-lm", *words)
    with Training(command, tmp_path, stdout=writing, stderr=writing) as training:
        os.close(writing)
        leave_after_the_first_line(reading)
        assert training.wait_for_end() == 0
    assert (tmp_path / "out" / f"checkpoint-{STEPS}" / "manifest.json").exists()
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_command_that_only_prints_ends_quietly(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "dstrain", "--help"],
        env=quiet_environment(),
        cwd=tmp_path,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writing)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
def test_a_full_disk_under_the_log_is_no_end_of_a_training(tmp_path):
    path = write_script(tmp_path, max_steps=3, use_cpu=True, pause=0)
    with Path("/dev/full").open("w") as full:
        with Training([sys.executable, str(path)], tmp_path, stdout=full, stderr=full) as training:
            assert training.wait_for_end() == 0
        assert (tmp_path / "done-0").exists()
