"""The memory that this machine has left."""

from __future__ import annotations

import contextlib
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Return the host memory that can still be taken, in bytes; None where that is unknown.

    The limit of the container (cgroup v2) counts too.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        cache = dict(
            line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines()
        ).get("inactive_file", "0")
        found.append(max(0, limit - used + int(cache)))
    return min(found, default=None)
