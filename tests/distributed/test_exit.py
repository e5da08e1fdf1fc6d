"""A script that has ended well ends with the status 0."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import atexit

def look():
    import torch.distributed as dist
    print("the group is", "up" if dist.is_initialized() else "down", flush=True)

atexit.register(look)  # called after what is registered later
import torch
from dstrain import Trainer, TrainingArguments
from dstrain.core.ranks import gather_objects

model = torch.nn.Linear(2, 2)
args = TrainingArguments({folder!r}, report_to="none", use_cpu=True)
trainer = Trainer(model, args)
gather_objects("the last tensors of a worker thread")
"""


def test_the_process_group_goes_down_before_python_ends(tmp_path: Path) -> None:
    """Else a thread of gloo, which still lets go of tensors, would be stopped and abort."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path / "out")))
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    done = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "the group is down" in done.stdout
