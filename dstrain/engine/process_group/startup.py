"""Start-up and shutdown of accelerator, ranks and process group."""

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
    """Form the process group, and return the ranks; later calls only return the ranks.

    Works under the ``deepspeed`` launcher, torchrun and plain Python (one process, no environment
    to set). Divides the cores of a machine among its ranks. From here on this process drops output
    that cannot be written, and ends when its launcher has ended.

    Args:
        use_cpu: whether to train on the CPU even if there is an accelerator.
        backend: of torch's process group; None leaves it to DeepSpeed.
        timeout_seconds: of the process group.

    Raises:
        ConfigError: ``use_cpu`` after DeepSpeed was imported for another accelerator, more ranks
            on this machine than accelerators, ranks with different versions, or ranks that cannot
            connect.
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
    from dstrain.engine import ops, torch_builds
    from dstrain.engine.process_group import shared_memory
    from dstrain.engine.process_group.rendezvous import (
        as_rendezvous_error,
        check_rendezvous,
        rendezvous_error,
        warning_when_slow,
    )

    folder = ops.prepare_environment()
    ops.clear_stale_locks(folder)
    torch_builds.guard_builds()
    torch_builds.quote_library_folder()
    # DeepSpeed calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    ranks = launched_ranks()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # Hides credentials in the config, which DeepSpeed logs at the level info.
    get_logger("DeepSpeed")
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
        atexit.register(shared_memory.unlink_rank_buffer)  # for a start that fails
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
    atexit.unregister(_end_collectives)  # else each Trainer would register it once more
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
            # gloo and NCCL raise plain RuntimeErrors. If torch's group exists, the error is
            # DeepSpeed's, for an op that does not compile.
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
    """Check that all ranks run the same versions of the software; a collective of all ranks.

    Only the first call of a process checks. ``start`` calls this for a group that it forms.

    Raises:
        ConfigError: the versions differ; raised on every rank.
    """
    global _versions_are_same
    if not _versions_are_same:
        require_same_versions()
        _versions_are_same = True


def shut_down() -> None:
    """Destroy the process group, if there is one, at the end of a command."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _end_collectives() -> None:
    """Wait, before Python ends, until gloo's threads have released the tensors of collectives.

    They do so a moment after a collective has returned, and need the interpreter. If that is ending
    by then, it stops the thread inside of C++ code, which aborts the process: a successful run
    would have the exit status -6. Destroying the process group waits for the threads, which may in
    turn wait for a rank that has failed, so the wait has a limit. A group that the user has formed
    is the user's to destroy; there the threads get a short time.
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
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _single_process_environment() -> None:
    """Set the environment variables of a single rank, with a free port, if no launcher has."""
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(port))
