"""DeepSpeed's shared memory goes with its run, however that ends; leftovers are removed."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dstrain.engine.process_group.shared_memory import FOLDER, remove_leftovers
from tests.launch import ROOT, free_port, quiet_environment

JOB = """
import sys, time
import torch, torch.distributed as dist
from tests.distributed.runs import make_trainer
if sys.argv[2] == "own":
    dist.init_process_group("gloo")
trainer = make_trainer(sys.argv[1], stage=1, max_steps=1)
trainer.train()
numbers = torch.ones(5)
import deepspeed
deepspeed.comm.all_reduce(numbers)
assert numbers.tolist() == [2.0] * 5
print("trained", flush=True)
time.sleep(600)
"""


def names_of(port: str) -> list[str]:
    """Return the names of the buffers of the run at a port."""
    return [p.name for p in FOLDER.glob(f"deepspeed_allreduce_buffer_*_{port}_*")]


@pytest.mark.parametrize("group", ["ours", "own"])
def test_killed_ranks_leave_no_shared_memory(group: str, tmp_path: Path) -> None:
    """The names go as soon as all ranks have mapped the buffers, which go on working."""
    port = str(free_port())
    ranks = []
    for rank in range(2):
        facts = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        facts |= {"LOCAL_SIZE": "2"}  # without it DeepSpeed uses no shared memory
        facts |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", JOB, str(tmp_path / "out"), group]
        environment = quiet_environment() | facts
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=pipe, text=True))
    try:
        for rank in ranks:
            assert rank.stdout is not None
            assert any("trained" in line for line in rank.stdout)
        assert names_of(port) == []
        buffer = "deepspeed_allreduce_buffer"
        assert buffer in Path(f"/proc/{ranks[0].pid}/maps").read_text()  # it is in use
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
            rank.wait()
    assert names_of(port) == []


def test_leftovers_of_dead_runs_are_removed_and_nothing_else(tmp_path: Path) -> None:
    """By name, owner, age, and whether a process has it mapped."""
    user = os.getuid()
    stem = f"deepspeed_allreduce_buffer_{user}_127.0.0.1"
    others = {
        f"{stem}_29500_1.txt",
        f"deepspeed_allreduce_buffer_{user + 1}_127.0.0.1_29500_0",
        "deepspeed_something",
        "my_file",
        f"{stem}_29502_0",  # mapped
        f"{stem}_29503_0",  # just made
        f"{stem}_29504_0",  # a link
    }
    long_ago = time.time() - 10_000
    for name in [*others, f"{stem}_29500_0", f"{stem}_29500_17"]:
        path = tmp_path / name
        if name.endswith("29504_0"):
            path.symlink_to(tmp_path / "my_file")
            continue
        path.write_bytes(b"x" * 5000)
        os.utime(path, (long_ago, long_ago))
    os.utime(tmp_path / f"{stem}_29503_0")
    with open(tmp_path / f"{stem}_29502_0", "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    assert remove_leftovers(tmp_path) == 0  # all are new by the time of their change
    time.sleep(1.1)
    os.utime(tmp_path / f"{stem}_29503_0")
    assert remove_leftovers(tmp_path, settled_seconds=1.0) == 10_000
    assert {path.name for path in tmp_path.iterdir()} == others
    mapped.close()
