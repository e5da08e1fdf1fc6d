"""The memory of this machine: all of it, and what is left; the limits of containers count.

A container, a batch system or a service sets limits in control groups (cgroups), of version 1 or 2
or both, and each group is also held to the limits of the groups around it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


@dataclass(frozen=True)
class _Version:
    """Where a version of control groups says what a group may use and what it uses.

    Attributes:
        controllers: of a line in ``/proc/self/cgroup`` that names a group of it.
        mount: of the outermost group.
        limit: file with the most bytes, or a word where there is no limit.
        used: file with the bytes in use, files in the cache among them.
        cache: entry of ``memory.stat`` with the cached files that are given up first.
    """

    controllers: str
    mount: str
    limit: str
    used: str
    cache: str


_VERSIONS = (
    _Version("", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    _Version(
        "memory",
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def total_bytes(*, root: Path = _ROOT) -> int:
    """Return the memory of this machine, or what this process may use of it, in bytes.

    Args:
        root: of the file system with ``/proc`` and ``/sys``.
    """
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *(limit for limit, _ in _limits(root))])


def available_bytes(*, root: Path = _ROOT) -> int | None:
    """Return the memory that this process can still take, in bytes; None where that is unknown.

    What caches of files would give up counts as free.

    Args:
        root: of the file system with ``/proc`` and ``/sys``.
    """
    found = [left for _, left in _limits(root)]
    with contextlib.suppress(OSError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    return min(found, default=None)


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield the limit of each group around this process, and what is left of it at most."""
    for version, group in _groups(root):
        with contextlib.suppress(OSError, ValueError):  # a word: no limit
            limit = int((group / version.limit).read_text())
            yield limit, _left(version, group, limit)


def _left(version: _Version, group: Path, limit: int) -> int:
    used = cache = 0
    with contextlib.suppress(OSError, ValueError):
        used = int((group / version.used).read_text())
    with contextlib.suppress(OSError, ValueError):
        entries = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        cache = next((int(n) for name, n in entries if name == version.cache), 0)
    return max(0, limit - used + cache)


def _groups(root: Path) -> Iterator[tuple[_Version, Path]]:
    """Yield the groups that this process is in, from its own to the outermost that it can see.

    In a container the path may be one of the machine around it, which is not there; the outermost
    group is then the container's own.
    """
    paths = {version: PurePosixPath() for version in _VERSIONS}
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for version in _VERSIONS:
                if version.controllers in controllers.split(","):
                    paths[version] = PurePosixPath(path.lstrip("/"))
    for version, group in paths.items():
        for part in (group, *group.parents):
            if ".." not in part.parts:
                yield version, root / version.mount / part
