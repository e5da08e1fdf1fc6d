"""Start measured processes with a deadline, end only those, and say what the machine was doing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOG_TAIL_CHARS = 3000
POLL_SECONDS = 0.1
PR_SET_PDEATHSIG = 1
# glibc gives large arrays back to the system and asks for them again at every step. The page faults
# of that cost both loops a fifth of a step here and are most of the noise, so ranks keep memory.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


class RunFailed(Exception):
    """A measured process failed or passed its deadline; the message has the end of its log."""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Make an environment for a measured process: offline, with its own ops and packages."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    values = {k: v for k, v in os.environ.items() if k not in (*ranks, "MASTER_ADDR")}
    values.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    values.setdefault("DS_LOG_LEVEL", "warning")
    paths = [str(ROOT), values.get("PYTHONPATH", "")]
    # torch looks for ninja on the path even to load an op that is already built.
    programs = [str(Path(sys.executable).parent), values.get("PATH", os.defpath)]
    return values | {
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PATH": os.pathsep.join(programs),
        **(extra or {}),
    }


def run_ranks(
    arguments: Sequence[str],
    *,
    world_size: int,
    threads: int,
    deadline_seconds: float,
    keep_memory: bool = False,
) -> str:
    """Run ``python arguments...`` as that many ranks of one process group on this machine.

    Args:
        arguments: script and its arguments.
        world_size: number of ranks.
        threads: threads per rank for computing on the CPU.
        deadline_seconds: time until all ranks are ended.
        keep_memory: freed host memory stays with the process; for timings, not for memory figures.

    Returns:
        the output of rank 0.

    Raises:
        RunFailed: a rank failed, or they were not done in time; all are ended then.
    """
    port = _free_port()
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": str(threads),
        **(KEEP_MEMORY if keep_memory else {}),
    }
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(world_size)]
        processes: list[subprocess.Popen[str]] = []
        stack.callback(_remove_shared_memory, port)
        stack.callback(lambda: [*map(end, processes)])
        for rank, log in enumerate(logs):
            rank_facts = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env=environment(rank_facts),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                    text=True,
                )
            )
        due = time.monotonic() + deadline_seconds
        while any(p.poll() is None for p in processes):
            failed = [rank for rank, p in enumerate(processes) if p.poll()]
            late = time.monotonic() > due
            if failed or late:
                what = f"rank {failed[0]} failed" if failed else f"not done in {deadline_seconds} s"
                raise RunFailed(f"{what}\n{_read(logs[failed[0] if failed else 0])}")
            time.sleep(POLL_SECONDS)
        failed = [rank for rank, p in enumerate(processes) if p.returncode]
        if failed:
            raise RunFailed(f"rank {failed[0]} failed\n{_read(logs[failed[0]])}")
        return _read(logs[0])


def clean_up_when_terminated() -> None:
    """Leave by an exception on SIGTERM, so that ranks are ended and their memory is freed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def die_with_parent() -> None:
    """Have the system kill this child, between fork and exec, when its parent is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process that is still running and heads its session, with what it has started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def usable_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_gpu() -> bool:
    """Tell whether there is an NVIDIA or AMD GPU, found without torch."""
    return any(Path(f"/dev/{name}").exists() for name in ("nvidiactl", "kfd"))


def load() -> float:
    """Return the number of runnable processes, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


def wait_until_quiet(limit: float, *, patience_seconds: float) -> None:
    """Wait until fewer than ``limit`` processes of others run, or patience ends.

    Looks at the processes running at this instant, five times in a row: the load average
    remembers the last minute, and so what was measured before.
    """
    due = time.monotonic() + patience_seconds
    quiet = 0
    while quiet < 5 and time.monotonic() < due:
        quiet = quiet + 1 if running_now() <= limit else 0
        time.sleep(0.2 if quiet else 1.0)


def running_now() -> int:
    """Count runnable processes and threads at this instant but this one; 0 where not known."""
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1
    except (OSError, ValueError, IndexError):
        return 0


def machine() -> dict[str, object]:
    """Return facts of this machine for a report."""
    return {
        "host": platform.node(),
        "processor": _processor(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells, titles first, in aligned columns: text left, numbers right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if index and _is_number(rows[1:], index) else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _is_number(rows: Sequence[Sequence[str]], index: int) -> bool:
    return any(row[index][:1].isdigit() or row[index][:1] in "+-" for row in rows)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _remove_shared_memory(port: int) -> None:
    """Remove DeepSpeed's all-reduce buffers (128 MiB per CPU rank), which it never unlinks."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_*"):
        buffer.unlink(missing_ok=True)


def _read(log: object) -> str:
    log.seek(0)  # type: ignore[attr-defined]
    return log.read()[-LOG_TAIL_CHARS:]  # type: ignore[attr-defined]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
