"""Measurement of the memory of accelerators, host and local disk."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Sequence

from dstrain.config import Machine
from dstrain.core.files import expanded
from dstrain.core.host import available_bytes, total_bytes
from dstrain.core.ranks import Ranks


def read_machine(ranks: Ranks, *, disk: str | None = None) -> Machine:
    """Return the total memory of this rank's machine, which does not depend on its present use.

    Args:
        ranks: facts of this process, among them the number of ranks on the machine.
        disk: folder on a local disk to offload to, of which the free space is read.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    host = total_bytes()
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
    """Return the minimum over the machines of all ranks, from which all decide alike."""
    return Machine(
        ranks=max(m.ranks for m in machines),
        device_bytes=min(m.device_bytes for m in machines),
        host_bytes=_least(m.host_bytes for m in machines),
        nvme_bytes=_least(m.nvme_bytes for m in machines),
    )


def free_memory_bytes(ranks: Ranks) -> int:
    """Return the free memory of this rank's device; on the CPU, its share of the host's.

    Returns:
        bytes.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        return int(accelerator.available_memory(ranks.local_rank))
    available = available_bytes()
    return (total_bytes() if available is None else available) // ranks.local_world_size


def _least(values: Iterable[int | None]) -> int | None:
    """Return the smallest value; None if any is not known."""
    known = list(values)
    return None if None in known else min(v for v in known if v is not None)
