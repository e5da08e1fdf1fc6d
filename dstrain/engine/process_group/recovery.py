"""Recovery of the process group after one rank has run out of memory.

The rank that ran out of memory cannot take part in the collectives in which the other ranks wait.
It ends their waiting by cutting its connections (gloo) or aborting its communicators (nccl). All
ranks then destroy their process groups and form new ones. Before that, the rank sets a key in the
store of the first process group, so that the other ranks can tell lack of memory from other
failures, which end the run.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
import time
import uuid
from datetime import timedelta
from typing import Any

import torch

from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, barrier, broadcast_object, gather_objects, is_distributed

logger = get_logger(__name__)

_PATIENCE_SECONDS = 20.0
_WATCH_SECONDS = 0.5
_MESSAGES = ("out of memory", "can't allocate memory", "CUDNN_STATUS_NOT_SUPPORTED")
_Connection = tuple[tuple[str, int], tuple[str, int]]


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the device, or the host, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


class ProcessGroupRecovery:
    """Aborts and rebuilds the process groups of one training.

    To be constructed after the engine, since connections that are made later are not known.
    """

    def __init__(self, ranks: Ranks, *, timeout_seconds: float) -> None:
        """Record the connections between ranks; a collective of all ranks.

        Args:
            ranks: rank of this process, and the number of ranks.
            timeout_seconds: timeout of the groups that are formed after an abort.
        """
        self._ranks, self._timeout = ranks, timedelta(seconds=timeout_seconds)
        self._many = is_distributed()
        if not self._many:
            return
        import torch.distributed as dist

        token = broadcast_object(uuid.uuid4().hex)
        self._base = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"dstrain-recovery-{token}", self._base)
        self._backend = dist.get_backend()
        self._micro_batches = dist.new_group(backend="gloo", timeout=self._timeout)
        barrier()
        theirs = gather_objects(sorted(_connections()))
        # A connection between two ranks is in the lists of both, with its ends exchanged.
        ends = {end for rank, of_rank in enumerate(theirs) if rank != ranks.rank for end in of_rank}
        self._between = {(here, there) for here, there in _connections() if (there, here) in ends}
        self._ended = threading.Event()
        if self._backend != "gloo":
            threading.Thread(target=self._watch_for_failure, daemon=True).start()

    def wait_for_all(self) -> None:
        """Wait until all ranks have run their micro-batches, so that all of them step or none.

        Uses a barrier of gloo, and does not wait for the device.
        """
        if self._many:
            import torch.distributed as dist

            dist.barrier(group=self._micro_batches)

    def report_out_of_memory(self) -> None:
        """Set the key in the store that tells all ranks that this one has run out of memory."""
        if self._many:
            self._store.set("failed", str(self._ranks.rank))

    def another_rank_ran_out(self) -> bool:
        """Tell whether another rank has run out of memory, which may explain an error of this one.

        Waits up to 20 seconds for that rank to report it.
        """
        if not self._many:
            return False
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._store.check(["failed"]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def abort(self) -> None:
        """Destroy all process groups; collectives in which ranks wait for this one then fail."""
        if not self._many:
            return
        import torch.distributed as dist

        self._ended.set()
        if self._backend == "gloo":
            self._cut_connections()
        else:
            with contextlib.suppress(Exception):  # the watching thread may have aborted it already
                dist.distributed_c10d._abort_process_group()
        if dist.is_initialized():
            dist.destroy_process_group()
        _forget_deepspeed_groups()

    def rebuild(self, module: torch.nn.Module) -> None:
        """Form a new group of all ranks, and set it in the partitioned parameters of ``module``."""
        if not self._many:
            return
        import torch.distributed as dist

        store = dist.PrefixStore("group", self._store)
        dist.init_process_group(
            self._backend,
            store=store,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            timeout=self._timeout,
        )
        for parameter in module.parameters():
            if hasattr(parameter, "ds_process_group"):
                parameter.ds_process_group = dist.group.WORLD

    def close(self) -> None:
        """Stop watching for a failed rank, at the end of the training."""
        if self._many:
            self._ended.set()

    def _cut_connections(self) -> None:
        """Shut down the TCP connections to other ranks, except those to the store."""
        ports = {int(os.environ.get("MASTER_PORT", "0"))}
        for connection, descriptor in _connections().items():
            if connection in self._between and not ports & {connection[0][1], connection[1][1]}:
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as end:
                    end.shutdown(socket.SHUT_RDWR)

    def _watch_for_failure(self) -> None:
        """Abort the group once a rank reports a failure; runs in a thread of its own.

        The main thread may be waiting on the device for a collective that the failed rank has not
        joined.
        """
        import torch.distributed as dist

        while not self._ended.wait(_WATCH_SECONDS):
            if self._store.check(["failed"]):
                with contextlib.suppress(Exception):
                    dist.distributed_c10d._abort_process_group()
                return


def _connections() -> dict[_Connection, int]:
    """Return the TCP connections of this process: (local, remote address) -> file descriptor."""
    found: dict[_Connection, int] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as end:
                if end.family in (socket.AF_INET, socket.AF_INET6):
                    found[_address(end.getsockname()), _address(end.getpeername())] = int(name)
        except OSError:  # closed meanwhile, or no connection
            continue
    return found


def _address(name: Any) -> tuple[str, int]:
    """Return host and port of a socket address, an IPv4 address in IPv6 form as IPv4."""
    return str(name[0]).removeprefix("::ffff:"), int(name[1])


def _forget_deepspeed_groups() -> None:
    """Reset DeepSpeed's module variables that reference the destroyed groups.

    The next engine would use these groups.
    """
    from deepspeed.utils import groups

    for name in (
        "_WORLD_GROUP",
        "_ZERO_PARAM_INTRA_PARALLEL_GROUP",
        "_TENSOR_MODEL_PARALLEL_GROUP",
        "_MODEL_PARALLEL_GROUP",
        "_DATA_PARALLEL_GROUP",
        "mesh_device",
    ):
        setattr(groups, name, None)
    for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP", "_ALL_TO_ALL_GROUP"):
        getattr(groups, name).clear()
