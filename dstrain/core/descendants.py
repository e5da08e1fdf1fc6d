"""Ending the processes that this one has started, with all that these have started themselves.

A signal to a process reaches none of those below it. Nor does one to its process group reach all:
ninja gives each of its compilers a group of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

_LOOK_SECONDS = 0.05


def descendants(pid: int) -> list[int]:
    """Return the processes below a process, each before its own. Grows with their number."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread, or its process, has ended
            for child in map(int, children.read_text().split()):
                found += [child, *descendants(child)]
    return found


def end_descendants(grace_seconds: float = 5.0) -> None:
    """End all processes below this one: ask by SIGTERM, then kill; return when none runs.

    Args:
        grace_seconds: how long they may take before they are killed.
    """
    asked: set[int] = set()
    kill_at = time.monotonic() + grace_seconds
    while True:
        # Looked for each time: one may start another, and those whose parent ends are not below
        # this process any more.
        late = time.monotonic() > kill_at
        running = [pid for pid in asked.union(descendants(os.getpid())) if _is_running(pid)]
        if not running or time.monotonic() > kill_at + grace_seconds:
            return
        for pid in running:
            if late or pid not in asked:
                asked.add(pid)
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        time.sleep(_LOOK_SECONDS)


def _is_running(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
