"""Start-up of accelerator, ranks and process group; deepspeed is imported only here."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import socket
import threading
import time
import warnings
from datetime import timedelta

from dstrain.core.errors import ConfigError, Problem
from dstrain.core.launcher import watch_launchers
from dstrain.core.log import get_logger
from dstrain.core.output import drop_what_cannot_be_written
from dstrain.core.ranks import Ranks, launched_ranks
from dstrain.core.versions import require_same_versions
from dstrain.engine.process_group.devices import choose_accelerator

logger = get_logger(__name__)

_SHUT_DOWN_SECONDS = 10.0
_RELEASE_SECONDS = 0.1
_started_group = False
_versions_are_same = False


def start(
    *, use_cpu: bool = False, backend: str | None = None, timeout_seconds: int = 1800
) -> Ranks:
    """Bring up the process group once; later calls only return the ranks.

    Works under the ``deepspeed`` launcher, torchrun and plain Python (one process, no environment
    to set). On the CPU the ranks of one machine share its cores. From here on this process drops
    output that cannot be written, and ends when its launcher is gone.

    Raises:
        ConfigError: ``use_cpu`` after DeepSpeed was imported for another accelerator, more ranks
            on this machine than accelerators, ranks with different versions, or ranks that cannot
            meet.
    """
    global _started_group
    import torch
    import torch.distributed as dist

    drop_what_cannot_be_written()
    watch_launchers()
    started = dist.is_initialized()
    choose_accelerator(use_cpu=use_cpu)
    if not started:
        _single_process_environment()
    from dstrain.engine import ops
    from dstrain.engine.process_group import shared_memory
    from dstrain.engine.process_group.rendezvous import (
        as_rendezvous_error,
        check_rendezvous,
        rendezvous_error,
        warning_when_slow,
    )

    folder = ops.prepare_environment()
    ops.clear_stale_locks(folder)
    ops.guard_builds()
    # DeepSpeed calls collectives by names that torch 2.13 is renaming.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    ranks = launched_ranks()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    get_logger("DeepSpeed")  # which logs the whole config at the level info: credentials hidden
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if use_cpu and not on_cpu:
        raise ConfigError(
            Problem(
                f"use_cpu=True, but DeepSpeed was already imported for {accelerator.device_name()}",
                "DeepSpeed chooses its accelerator on import",
                "set DS_ACCELERATOR=cpu, or build the arguments before importing deepspeed",
            )
        )
    # Ranks share the cores of their machine, also under CPU offload beside an accelerator.
    if "OMP_NUM_THREADS" not in os.environ and ranks.local_world_size > 1:
        torch.set_num_threads(max(1, _usable_cores() // ranks.local_world_size))
    if on_cpu:
        library = ops.OPS["shm_comm"].folder
        if ranks.is_local_main and not (folder / library / f"{library}.so").exists():
            logger.warning("building DeepSpeed's shm_comm op (about a minute, once)")
        atexit.register(shared_memory.unlink_rank_buffer)  # a start that fails leaves it
        if ranks.is_local_main:
            shared_memory.remove_leftovers()
    else:
        if ranks.local_rank >= accelerator.device_count():
            raise ConfigError(
                Problem(
                    f"local rank {ranks.local_rank} with {accelerator.device_count()} devices",
                    "each rank drives one device",
                    f"start at most {accelerator.device_count()} ranks on this machine, and let "
                    "each see all of its devices",
                )
            )
        accelerator.set_device(ranks.local_rank)
    atexit.unregister(_end_collectives)  # once, however many Trainers there are
    atexit.register(_end_collectives)
    if started:
        return Ranks(
            dist.get_rank(), ranks.local_rank, dist.get_world_size(), ranks.local_world_size
        )
    check_rendezvous(ranks, timeout_seconds=timeout_seconds)
    _started_group = True
    # DeepSpeed prints from every rank here; a failure still raises.
    with contextlib.redirect_stdout(io.StringIO()), warning_when_slow(ranks):
        try:
            deepspeed.init_distributed(
                dist_backend=backend,
                timeout=timedelta(seconds=timeout_seconds),
                verbose=False,
                auto_mpi_discovery=False,
            )
        except RuntimeError as error:
            # gloo's and NCCL's errors have no class of their own. Once the group is up it is
            # DeepSpeed that fails, at an op that does not compile.
            if dist.is_initialized() and not isinstance(error, dist.DistError):
                raise
            raise rendezvous_error(error, ranks) from error
    # Some backends connect the ranks only here, at their first collective.
    with as_rendezvous_error(ranks):
        check_versions()
    if on_cpu:
        shared_memory.unlink_once_mapped()
    return ranks


def check_versions() -> None:
    """Check that all ranks run the same versions, once per process group; a collective.

    ``start`` does so for a group that it brings up.

    Raises:
        ConfigError: ranks run different software; on all of them alike.
    """
    global _versions_are_same
    if not _versions_are_same:
        require_same_versions()
        _versions_are_same = True


def shut_down() -> None:
    """Take the process group down; the last thing a command does."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _end_collectives() -> None:
    """Make sure that no collective is under way when Python ends.

    A worker thread of gloo releases the tensors of a collective a moment after the ranks have gone
    on, and needs Python for that. If Python is ending by then, it stops the thread inside of C++
    code, which aborts the process: a successful run would have the status -6. Destroying the
    process group waits for these threads; they may be waiting for a rank that has failed, so there
    is a limit. A group that the user has brought up stays for the user to destroy: there the
    threads only get some time.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    ending = None
    if _started_group:
        with contextlib.suppress(RuntimeError):  # newer Pythons start no thread any more
            ending = threading.Thread(target=shut_down, daemon=True)
            ending.start()
    if ending is None or ending.ident is None:
        time.sleep(_RELEASE_SECONDS)
    else:
        ending.join(_SHUT_DOWN_SECONDS)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _single_process_environment() -> None:
    """Set the environment of a world of one process, where no launcher has; with a free port."""
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(port))
