"""The memory of an accelerator, of the host and of a local disk."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from dstrain.config import Machine
from dstrain.core.files import expanded
from dstrain.core.ranks import Ranks

# The limit that a container or a batch system sets, in cgroups version 2 and 1.
CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def read_machine(ranks: Ranks, *, disk: str | None = None) -> Machine:
    """Return the memory of this rank's machine in all, which is the same all run long.

    Args:
        ranks: how many share the machine.
        disk: a folder on a local disk to offload to.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    host = host_memory_bytes()
    if accelerator.device_name() == "cpu":
        device = host // ranks.local_world_size
    else:
        device = int(accelerator.total_memory(ranks.local_rank))
    free = None
    if disk is not None:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(expanded(disk)).free
    return Machine(ranks.local_world_size, device, host, free)


def least(machines: Sequence[Machine]) -> Machine:
    """Return what every rank has at least: all of them must come to the same decision."""
    return Machine(
        ranks=max(m.ranks for m in machines),
        device_bytes=min(m.device_bytes for m in machines),
        host_bytes=_least(m.host_bytes for m in machines),
        nvme_bytes=_least(m.nvme_bytes for m in machines),
    )


def host_memory_bytes(limits: Iterable[str] = CGROUP_LIMITS) -> int:
    """Return the memory of this machine, or what this process's container may use of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in limits:
        with contextlib.suppress(OSError, ValueError):  # "max" stands for no limit
            total = min(total, int(Path(name).read_text()))
    return total


def free_memory_bytes(ranks: Ranks) -> int:
    """Return the bytes that this rank's device has left now; on the CPU its share of the host's."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        return int(accelerator.available_memory(ranks.local_rank))
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    with contextlib.suppress(OSError, StopIteration):  # this one counts what caches would give up
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = int(next(n for n in lines if n.startswith("MemAvailable")).split()[1]) * 1024
    return min(available, host_memory_bytes()) // ranks.local_world_size


def _least(values: Iterable[int | None]) -> int | None:
    known = list(values)
    return None if None in known else min(v for v in known if v is not None)
