"""Leaving a training together when memory runs out on one rank, and meeting again.

The rank that failed cannot take part in the collectives that the others are in, so it must get
them out: its connections are cut (gloo) or its communicators aborted (nccl). All ranks then give
their process groups up and form new ones. What tells them from ranks that failed for another reason
is a note in the store that the first groups were formed with.
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
_LOOK_SECONDS = 0.5
_MESSAGES = ("out of memory", "can't allocate memory", "CUDNN_STATUS_NOT_SUPPORTED")
_Link = tuple[tuple[str, int], tuple[str, int]]


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the device, or the host, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


class Regroup:
    """The process groups of one training; made after its engine, whose groups it must know."""

    def __init__(self, ranks: Ranks, *, timeout_seconds: float) -> None:
        """Get ready to leave; a collective of all ranks.

        Args:
            ranks: this process among the others.
            timeout_seconds: of the groups that are formed after leaving.
        """
        self._ranks, self._timeout = ranks, timedelta(seconds=timeout_seconds)
        self._many = is_distributed()
        if not self._many:
            return
        import torch.distributed as dist

        token = gather_objects(uuid.uuid4().hex)[0]
        self._base = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"dstrain-regroup-{token}", self._base)
        self._backend = dist.get_backend()
        self._votes = dist.new_group(backend="gloo", timeout=self._timeout)
        barrier()
        theirs = gather_objects(sorted(_links()))
        # A connection between ranks is in the lists of both, seen from either end.
        ends = {link for rank, links in enumerate(theirs) if rank != ranks.rank for link in links}
        self._between = {link for link in _links() if (link[1], link[0]) in ends}
        self._ended = threading.Event()
        if self._backend != "gloo":
            threading.Thread(target=self._look_out, daemon=True).start()

    def vote(self) -> None:
        """Wait until all ranks have done their micro-batches, so that all or none step.

        Host memory and a socket; the device is not waited for.
        """
        if self._many:
            import torch.distributed as dist

            dist.barrier(group=self._votes)

    def say_failed(self) -> None:
        """Note for the others that this rank has run out of memory."""
        if self._many:
            self._store.set("failed", str(self._ranks.rank))

    def another_failed(self) -> bool:
        """Tell whether an error of this rank comes from another rank's lack of memory."""
        if not self._many:
            return False
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._store.check(["failed"]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def leave(self) -> None:
        """Give all process groups up, and free the ranks that wait for this one in a collective."""
        if not self._many:
            return
        import torch.distributed as dist

        self._ended.set()
        if self._backend == "gloo":
            self._cut()
        else:
            with contextlib.suppress(Exception):  # the look-out may have done it
                dist.distributed_c10d._abort_process_group()
        if dist.is_initialized():
            dist.destroy_process_group()
        _forget_groups()

    def meet(self, module: torch.nn.Module) -> None:
        """Form a new group with all ranks, which the parameters of ``module`` then use."""
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
        """Stop looking out: the training has ended."""
        if self._many:
            self._ended.set()

    def _cut(self) -> None:
        ports = {int(os.environ.get("MASTER_PORT", "0"))}
        for link, descriptor in _links().items():
            if link in self._between and not ports & {link[0][1], link[1][1]}:
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as end:
                    end.shutdown(socket.SHUT_RDWR)

    def _look_out(self) -> None:
        """Free a main thread that waits on the device for a rank that will not come."""
        import torch.distributed as dist

        while not self._ended.wait(_LOOK_SECONDS):
            if self._store.check(["failed"]):
                with contextlib.suppress(Exception):
                    dist.distributed_c10d._abort_process_group()
                return


def _links() -> dict[_Link, int]:
    """Return TCP connections of this process: (own, peer's address) -> file descriptor."""
    found: dict[_Link, int] = {}
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


def _forget_groups() -> None:
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
