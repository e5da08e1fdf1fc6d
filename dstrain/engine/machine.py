"""The memory of an accelerator, of the host (``core.host``) and of a local disk."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Sequence

from dstrain.config import Machine
from dstrain.core.files import expanded
from dstrain.core.host import available_bytes, total_bytes
from dstrain.core.ranks import Ranks


def read_machine(ranks: Ranks, *, disk: str | None = None) -> Machine:
    """Return the memory of this rank's machine in all, which is the same all run long.

    Args:
        ranks: how many share the machine.
        disk: a folder on a local disk to offload to.
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
    """Return what every rank has at least: all of them must come to the same decision."""
    return Machine(
        ranks=max(m.ranks for m in machines),
        device_bytes=min(m.device_bytes for m in machines),
        host_bytes=_least(m.host_bytes for m in machines),
        nvme_bytes=_least(m.nvme_bytes for m in machines),
    )


def free_memory_bytes(ranks: Ranks) -> int:
    """Return the bytes that this rank's device has left now; on the CPU its share of the host's."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        return int(accelerator.available_memory(ranks.local_rank))
    available = available_bytes()
    return (total_bytes() if available is None else available) // ranks.local_world_size


def _least(values: Iterable[int | None]) -> int | None:
    known = list(values)
    return None if None in known else min(v for v in known if v is not None)
