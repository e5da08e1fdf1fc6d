"""Aborting the process group when memory runs out on one rank, and building a new one.

The rank that failed cannot take part in the collectives that the other ranks wait in, so it must
free them: its connections are cut (gloo) or its communicators aborted (nccl). All ranks then
destroy their process groups and form new ones. A rank that fails for another reason goes on to
fail: the rank that ran out of memory leaves a note in the store that the first groups were formed
with.
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
from dstrain.core.ranks import Ranks, barrier, gather_objects, is_distributed

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

    Made after the engine, whose groups it must know.
    """

    def __init__(self, ranks: Ranks, *, timeout_seconds: float) -> None:
        """Note the connections between ranks; a collective of all ranks.

        Args:
            ranks: facts of this process.
            timeout_seconds: of the groups that are formed after an abort.
        """
        self._ranks, self._timeout = ranks, timedelta(seconds=timeout_seconds)
        self._many = is_distributed()
        if not self._many:
            return
        import torch.distributed as dist

        token = gather_objects(uuid.uuid4().hex)[0]
        self._base = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"dstrain-recovery-{token}", self._base)
        self._backend = dist.get_backend()
        self._micro_batches = dist.new_group(backend="gloo", timeout=self._timeout)
        barrier()
        theirs = gather_objects(sorted(_connections()))
        # A connection between ranks is in the lists of both, seen from either end.
        ends = {end for rank, of_rank in enumerate(theirs) if rank != ranks.rank for end in of_rank}
        self._between = {(here, there) for here, there in _connections() if (there, here) in ends}
        self._ended = threading.Event()
        if self._backend != "gloo":
            threading.Thread(target=self._watch_for_failure, daemon=True).start()

    def wait_for_all(self) -> None:
        """Wait until all ranks have done their micro-batches, so that all or none step.

        Host memory and a socket; the device is not waited for.
        """
        if self._many:
            import torch.distributed as dist

            dist.barrier(group=self._micro_batches)

    def report_out_of_memory(self) -> None:
        """Tell all ranks that this rank has run out of memory."""
        if self._many:
            self._store.set("failed", str(self._ranks.rank))

    def another_rank_ran_out(self) -> bool:
        """Tell whether an error of this rank comes from another rank's lack of memory."""
        if not self._many:
            return False
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._store.check(["failed"]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def abort(self) -> None:
        """Destroy all process groups, and free the ranks that wait for this one in a collective."""
        if not self._many:
            return
        import torch.distributed as dist

        self._ended.set()
        if self._backend == "gloo":
            self._cut_connections()
        else:
            with contextlib.suppress(Exception):  # the watching thread may have done it
                dist.distributed_c10d._abort_process_group()
        if dist.is_initialized():
            dist.destroy_process_group()
        _forget_deepspeed_groups()

    def rebuild(self, module: torch.nn.Module) -> None:
        """Form a new group of all ranks, which the parameters of ``module`` then use."""
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
        """Stop watching for a failed rank: the training has ended."""
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
        """Free a main thread that waits on the device for a rank that will not come."""
        import torch.distributed as dist

        while not self._ended.wait(_WATCH_SECONDS):
            if self._store.check(["failed"]):
                with contextlib.suppress(Exception):
                    dist.distributed_c10d._abort_process_group()
                return


def _connections() -> dict[_Connection, int]:
    """Return TCP connections of this process: (own, peer's address) -> file descriptor."""
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
    return str(name[0]).removeprefix("::ffff:"), int(name[1])


def _forget_deepspeed_groups() -> None:
    """Remove groups that DeepSpeed keeps in its modules and would hand to the next engine."""
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
