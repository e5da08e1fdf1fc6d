"""Total and available memory of this machine, with the limits of containers taken into account.

A container, a batch system or a service sets limits in control groups (cgroups), of version 1 or 2
or both. The limits of a group's parent groups apply to it too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


@dataclass(frozen=True)
class _CgroupVersion:
    """Names of the memory files in one version of Linux control groups (cgroups).

    Attributes:
        controllers: controller whose line in ``/proc/self/cgroup`` has the group's path; "" in
            version 2, which has a single line.
        mount: path where the outermost group is mounted, relative to the root.
        limit: file with the group's limit in bytes, or with a word such as "max" for no limit.
        used: file with the bytes in use, page cache included.
        cache: entry of ``memory.stat`` with the bytes of page cache that the kernel frees first.
    """

    controllers: str
    mount: str
    limit: str
    used: str
    cache: str


_VERSIONS = (
    _CgroupVersion("", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    _CgroupVersion(
        "memory",
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def total_bytes(*, root: Path = _ROOT) -> int:
    """Return the memory of this machine in bytes, or the lowest limit set for this process.

    Args:
        root: folder that contains ``proc`` and ``sys``.
    """
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *(limit for limit, _ in _limits(root))])


def available_bytes(*, root: Path = _ROOT) -> int | None:
    """Return the memory that this process can still allocate, in bytes; None where unknown.

    Page cache that the kernel would free counts as available.

    Args:
        root: folder that contains ``proc`` and ``sys``.
    """
    found = [left for _, left in _limits(root)]
    with contextlib.suppress(OSError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    return min(found, default=None)


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield, for each control group of this process, its limit and the bytes left under it."""
    for version, group in _groups(root):
        with contextlib.suppress(OSError, ValueError):  # ValueError: a word, so no limit
            limit = int((group / version.limit).read_text())
            yield limit, _left(version, group, limit)


def _left(version: _CgroupVersion, group: Path, limit: int) -> int:
    used = cache = 0
    with contextlib.suppress(OSError, ValueError):
        used = int((group / version.used).read_text())
    with contextlib.suppress(OSError, ValueError):
        entries = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        cache = next((int(n) for name, n in entries if name == version.cache), 0)
    return max(0, limit - used + cache)


def _groups(root: Path) -> Iterator[tuple[_CgroupVersion, Path]]:
    """Yield the folders of this process's control groups, from the innermost to the root group.

    In a container the path may be that on the host, which does not exist inside; the root group
    that the container sees is then its own group.
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
