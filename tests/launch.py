"""Start `deepspeed` as a user would, for tests of the command line and of faults."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
OUTPUT_TAIL_CHARS = 4000
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
RENDEZVOUS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE")


def free_port() -> int:
    """Return a TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def quiet_environment() -> dict[str, str]:
    """Return this environment, made fit for CPU ranks: no network, one thread, no rank facts."""
    bin_folder = Path(sys.executable).parent
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in (*RANK_VARIABLES, *RENDEZVOUS_VARIABLES, "PYTEST_ADDOPTS")
    }
    # A private folder of compiled ops: one shared by two environments is rebuilt at every switch.
    environment.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    return environment | {
        "DS_ACCELERATOR": "cpu",
        "DS_LOG_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        # torch looks for ninja on the path even to load an op that is already built.
        "PATH": os.pathsep.join([str(bin_folder), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "WANDB_MODE": "offline",
    }


def remove_shared_memory(port: int) -> None:
    """Unlink DeepSpeed's all-reduce buffers of the group at ``port``.

    DeepSpeed never does it: 128 MiB per rank would stay in memory after every group, and a later
    group on the same port would map the old buffers. What is already mapped stays usable.
    """
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_*"):
        buffer.unlink(missing_ok=True)


def launch(
    args: Sequence[str | os.PathLike[str]],
    *,
    num_gpus: int = 2,
    timeout: float,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``deepspeed --num_gpus N ... args`` and return its exit code, stdout and stderr.

    Args:
        args: launcher options, then the script and its arguments.
        num_gpus: number of ranks (CPU ranks here).
        timeout: seconds until everything is killed and `subprocess.TimeoutExpired` is raised, with
            the end of the output as a note.
        env: added to `quiet_environment()`.
        cwd: where to run, the current folder by default.
    """
    port = free_port()
    launcher = Path(sys.executable).with_name("deepspeed")
    options = ["--num_gpus", str(num_gpus), "--master_port", str(port)]
    command = [sys.executable, str(launcher), *options, *map(os.fspath, args)]
    # Files rather than pipes: an orphaned rank would hold a pipe open and hide that the front died.
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            command,
            env=quiet_environment() | dict(env or {}),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            _kill_session(process)
            for name, stream in (("stdout", stdout), ("stderr", stderr)):
                error.add_note(f"--- end of {name}\n{_read(stream)[-OUTPUT_TAIL_CHARS:]}")
            raise
        finally:
            # Also after a normal end: when the front process dies alone, the ranks run on.
            _kill_session(process)
            remove_shared_memory(port)
        return subprocess.CompletedProcess(
            command, process.returncode, _read(stdout), _read(stderr)
        )


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the session that ``process`` leads."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(stream: IO[str]) -> str:
    stream.seek(0)
    return stream.read()


def in_fresh_process(function: Callable[[], None], seconds: float = 120) -> None:
    """Call a function of a module in a process that no test has used, such as one without groups.

    A test process keeps the process group that a Trainer has made there.

    Raises:
        AssertionError: the function raised (its traceback is printed) or took longer.
    """
    process = multiprocessing.get_context("spawn").Process(target=function)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0
