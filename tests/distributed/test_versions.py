"""Ranks with different software end at start, alike, with who has what."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, free_port, quiet_environment

JOB = """
import sys
import torch.distributed as dist
from dstrain import TrainingArguments
from dstrain.core.errors import ConfigError
from dstrain.trainer.build import start_run
own_group = sys.argv[2] == "own"
if own_group:
    dist.init_process_group("gloo")
try:
    args = TrainingArguments(sys.argv[1])
    start_run(args)
    if own_group:
        from dstrain import Trainer
        from tests.models import tiny_llama
        Trainer(tiny_llama(), args)
except ConfigError as error:
    print(error, flush=True)
    sys.exit(2)
"""


@pytest.mark.parametrize("group", ["ours", "own"])
def test_another_checkout_on_the_second_rank_is_an_error_on_both(
    group: str, tmp_path: Path
) -> None:
    """Source that differs counts although the version is the same; nobody waits for a time-out."""
    other = tmp_path / "other"
    shutil.copytree(ROOT / "dstrain", other / "dstrain", ignore=shutil.ignore_patterns("*.pyc"))
    (other / "tests").symlink_to(ROOT / "tests")
    with open(other / "dstrain" / "__init__.py", "a") as file:
        file.write("# changed\n")
    port = str(free_port())
    ranks = []
    for rank, folder in enumerate([ROOT, other]):
        facts = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        facts |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = quiet_environment() | facts | {"PYTHONPATH": os.fspath(folder)}
        command = [sys.executable, "-c", JOB, str(tmp_path / "out"), group]
        pipe = subprocess.PIPE
        ranks.append(
            subprocess.Popen(
                command, env=environment, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True
            )
        )
    outputs = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], outputs
    assert outputs[0][0] == outputs[1][0]
    said = outputs[0][0]
    assert "dstrain is not the same on all ranks" in said
    assert "on rank 0 (" in said
    assert "on rank 1 (" in said
    assert "torch is not" not in said
