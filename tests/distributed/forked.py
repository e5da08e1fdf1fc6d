"""Runs whose ranks are forks of a process that has imported everything, so they start at once.

``python -m tests.distributed.forked JOB FOLDER`` runs a function of ``tests.distributed.jobs`` in
such a process: it gets the folder, and what it found is written to ``FOLDER/found.json``. The
process itself runs no collective, backward pass or thread, which a fork would not survive.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.launch import ROOT, free_port, quiet_environment, remove_shared_memory

_PR_SET_PDEATHSIG = 1
_LOG_TAIL_CHARS = 4000


class Ranks:
    """The ranks of one run, each a fork of this process."""

    def __init__(self, number: int, job: Callable[[], None], log: Path) -> None:
        """Fork them; each runs ``job`` and ends.

        Args:
            number: how many.
            job: what a rank does, with the environment of a launcher.
            log: file for what they print.
        """
        self.port = free_port()
        self.log = log
        self.living: set[int] = set()
        self.failed = False
        for rank in range(number):
            pid = os.fork()
            if pid == 0:
                self._be_rank(rank, number, job)
            self.living.add(pid)

    def _be_rank(self, rank: int, number: int, job: Callable[[], None]) -> None:
        status = 1
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number),
                LOCAL_WORLD_SIZE=str(number),
                LOCAL_SIZE="0",  # DeepSpeed then makes no 128 MiB of shared memory per rank
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.port),
            )  # fmt: skip
            with open(self.log, "a", buffering=1) as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            job()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def poll(self) -> bool:
        """Tell whether a rank is still alive; note those that have ended."""
        for pid in list(self.living):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.living.discard(pid)
                self.failed |= status != 0
        return bool(self.living)

    def wait(self, seconds: float) -> None:
        """Wait until all have ended, and well."""
        deadline = time.monotonic() + seconds
        while self.poll() and not self.failed:
            if time.monotonic() > deadline:
                break
            time.sleep(0.005)
        ended = not self.living and not self.failed
        self.kill()
        assert ended, self.log.read_text()[-_LOG_TAIL_CHARS:]

    def kill(self, pids: list[int] | None = None) -> None:
        """Kill some ranks, or all that are left and clear up after them."""
        for pid in self.living if pids is None else pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if pids is None:
            for pid in list(self.living):
                os.waitpid(pid, 0)
                self.living.discard(pid)
            remove_shared_memory(self.port)


def run_job(name: str, folder: Path, *, timeout: float) -> Any:
    """Run a job of ``tests.distributed.jobs``; what it found."""
    command = [sys.executable, "-m", "tests.distributed.forked", name, str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=quiet_environment(), timeout=timeout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-_LOG_TAIL_CHARS:] + done.stderr[-_LOG_TAIL_CHARS:]
    return json.loads((folder / "found.json").read_text())


def _import_everything() -> None:
    import torch

    torch.set_num_threads(1)
    import deepspeed  # noqa: F401 - what costs a process its first seconds
    from deepspeed.accelerator import get_accelerator

    import dstrain.checkpoint
    import dstrain.engine
    import dstrain.trainer.trainer  # noqa: F401
    from tests.models import tiny_llama

    tiny_llama()
    for name in ("ShareMemCommBuilder", "FusedAdamBuilder", "CPUAdamBuilder"):
        get_accelerator().create_op_builder(name).load()
    # 16-bit floats of this kind train on this CPU too, slowly; DeepSpeed is not sure of it.
    type(get_accelerator()).is_fp16_supported = lambda self: True


def _import_what_a_run_does(folder: Path) -> None:
    """Import what a rank of a first short run has imported, so that later ones find it here."""
    from tests.distributed.jobs import train

    names = folder / "modules"

    def rank() -> None:
        train(folder / "first", max_steps=1)
        names.write_text("\n".join(sorted(sys.modules)))

    Ranks(1, rank, folder / "log-first").wait(120)
    for name in names.read_text().split():
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    # What is here now stays: no rank's collector has to look through it.
    gc.collect()
    gc.freeze()


def main() -> None:
    """Run one job."""
    from tests.distributed import jobs

    _import_everything()
    folder = Path(sys.argv[2])
    _import_what_a_run_does(folder)
    found = getattr(jobs, sys.argv[1])(folder)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
