"""Watching the processes that launched this rank, and ending the rank when one of them dies.

A launcher that is killed leaves its ranks training, with nobody to wait for them or to stop them.
Only processes that are certainly launchers are watched, and those between them and this rank:
``deepspeed`` and its ``launch.py``, torchrun, a parent of ``multiprocessing``, a script of
``launch/``, the session of ssh in which pdsh starts a ``launch.py``; MPI and Slurm where they are
the parent. Shells are not watched, as one may end, or hand its children to process 1, while its
jobs go on: after ``python script.py &`` or under nohup, setsid, tmux and the like.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SCRIPT = "DSTRAIN_SCRIPT"
"""Environment variable with the process number of the ``launch/`` script that started this rank."""

JOB = "DSTRAIN_JOB"
"""Environment variable with the folder in which ranks leave files for that script."""

_LOOK_SECONDS = 1.0
GRACE_SECONDS = 600.0
"""Seconds that a rank whose launcher is gone has for its last save before it is ended."""

_COMMANDS = ("deepspeed", "ds", "torchrun")
_MODULES = (
    *("deepspeed.launcher.launch", "deepspeed.launcher.runner"),
    *("torch.distributed.run", "torch.distributed.launch"),
)
_ONE_MACHINE = "deepspeed.launcher.launch"
_PARENTS = (
    *("mpirun", "mpiexec", "orted", "prted", "prterun", "hydra_pmi_proxy", "mpiexec.hydra"),
    "slurmstepd",
)


@dataclass(frozen=True)
class Process:
    """Facts of a process, read once from ``/proc``.

    A number may be given to another process later; the start time tells the two apart.
    """

    pid: int
    parent: int
    started: str
    words: tuple[str, ...]

    @staticmethod
    def of(pid: int) -> Process | None:
        """Read the facts of a process; return None when it has ended or is a zombie."""
        try:
            after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            return None
        if after_name[0] in "ZX":
            return None
        return Process(pid, int(after_name[1]), after_name[19], tuple(words.split("\0")))

    def is_there(self) -> bool:
        """Tell whether this process is still running."""
        now = Process.of(self.pid)
        return now is not None and now.started == self.started

    def launches(self) -> bool:
        """Tell whether this process's command is that of a launcher of ranks."""
        command = os.path.basename(self.words[0])
        if not command.startswith("python"):
            return command in _COMMANDS
        runs = next((word for word in self.words[1:] if not word.startswith("-")), "")
        return runs in _MODULES or os.path.basename(runs) in _COMMANDS

    def __str__(self) -> str:
        """Return its command and process number, for messages."""
        words = [word for word in self.words[:4] if word and not word.startswith("-")]
        if len(words) > 1 and os.path.basename(words[0]).startswith("python"):
            words = words[1:]
        return f"{os.path.basename(words[0]) if words else 'a process'} ({self.pid})"


def launchers() -> list[Process]:
    """Return the ancestors of this process that must not end before it, the nearest first."""
    above = list(_above())
    if not above:
        return []
    script = os.environ.get(SCRIPT, "")
    last = -1
    for index, process in enumerate(above):
        told = script == str(process.pid)
        direct = index == 0 and os.path.basename(process.words[0].split(":")[0]) in _PARENTS
        if process.launches() or told or direct:
            last = index
    if os.getsid(0) == os.getpid() and not above[0].launches():
        last = -1  # leads a session of its own: detached from a rank on purpose
    # Started by pdsh: the remote shell, whose command is the whole line, and its ssh session count.
    if last >= 0 and any(_ONE_MACHINE in word for word in above[last].words):
        while last + 1 < len(above) and _is_of_remote_start(above[last + 1]):
            last += 1
    watched = above[: last + 1]
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid not in [p.pid for p in watched]:
        found = Process.of(parent.pid) if parent.pid else None
        watched += [found] if found is not None else []
    return watched


def _is_of_remote_start(process: Process) -> bool:
    line = " ".join(process.words)
    return _ONE_MACHINE in line or os.path.basename(process.words[0]).startswith("sshd")


def _above() -> Iterator[Process]:
    """Yield the ancestors of this process, the parent first, without process 1."""
    pid = os.getppid()
    while pid > 1:
        process = Process.of(pid)
        if process is None:
            return
        yield process
        pid = process.parent


class _Watch:
    """Thread that checks once a second, in a few small files of /proc, that launchers live.

    Attributes:
        ends: the rank is ending as asked, so that no SIGTERM is sent.
        pid: process that the thread runs in; a fork of it has no such thread.
    """

    def __init__(self, watched: list[Process]) -> None:
        self.watched, self.ends, self.pid = watched, False, os.getpid()
        threading.Thread(target=self._look, name="dstrain-launcher", daemon=True).start()

    def _look(self) -> None:
        while (gone := self._gone()) is None:
            time.sleep(_LOOK_SECONDS)
        if not self.ends:
            _print_for_rank(
                f"{gone} is gone, which started this rank: it saves where it can, and ends"
            )
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        _print_for_rank(f"not ended {GRACE_SECONDS:.0f} s after {gone}: it ends at once")
        os._exit(128 + signal.SIGTERM)

    def _gone(self) -> Process | None:
        return next((process for process in self.watched if not process.is_there()), None)


_watch: _Watch | None = None


def watch_launchers() -> None:
    """Start a thread that sends this process SIGTERM when a process that launched it has ended.

    Call it once in a process; later calls do nothing. Schedulers send SIGTERM too: training saves
    and ends, and any other code ends at once.
    """
    global _watch
    if not Path("/proc/self/stat").exists():
        return
    if _watch is not None and _watch.pid == os.getpid():  # a fork has no threads
        return
    watched = launchers()
    if not watched and _was_launched():
        # The launcher ended while this process was starting.
        _print_for_rank("its launcher is gone: it ends")
        os.kill(os.getpid(), signal.SIGTERM)
    if watched:
        _watch = _Watch(watched)


def watch_launchers_of_rank() -> None:
    """Call ``watch_launchers``, but only where the parent itself is a launcher of ranks.

    Called when dstrain is imported: preparing data may take hours from the import to the first
    ``Trainer``, and a launcher that has died by then is no longer among the ancestors. A worker or
    another child of a rank that imports dstrain ends with that rank, and must not be ended while
    the rank saves.
    """
    if "RANK" not in os.environ or multiprocessing.parent_process() is not None:
        return
    parent = Process.of(os.getppid())
    if parent is not None and parent.launches():
        watch_launchers()


def note_ending(status: int) -> None:
    """Record that this rank is ending with ``status`` as asked, so that no SIGTERM is sent."""
    if _watch is not None:
        _watch.ends = True
    note_end(status)


def is_launched() -> bool:
    """Tell whether this rank has launchers and watches them."""
    return _watch is not None


def _was_launched() -> bool:
    """Tell whether DeepSpeed's ``launch.py`` set this environment for this process itself."""
    launched = {"RANK", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"} <= set(os.environ)
    can_see = os.getppid() == 1 or Process.of(os.getppid()) is not None
    return launched and can_see and os.getsid(0) != os.getpid()


def _print_for_rank(what: str) -> None:
    rank = os.environ.get("RANK", "0")
    with contextlib.suppress(OSError, ValueError):  # standard error has no reader, or is closed
        print(f"[rank {rank}] {what}", file=sys.stderr, flush=True)


# --- files of ranks for their launch/ script ------------------------------------------------------


def note_begin() -> None:
    """Write this rank's process number to a file, so that its ``launch/`` script can signal it."""
    _note("rank", os.getpid())


def note_end(status: int) -> None:
    """Write this rank's exit status to a file for the ``launch/`` script that started it.

    DeepSpeed's launcher, which would report the status, may have been killed by then.
    """
    _note("status", status)


def _note(name: str, number: int) -> None:
    folder, rank = os.environ.get(JOB), os.environ.get("LOCAL_RANK")
    if folder and rank is not None:
        with contextlib.suppress(OSError):
            path = Path(folder) / f"{name}-{rank}"
            path.with_suffix(".new").write_text(f"{number}\n")
            path.with_suffix(".new").replace(path)
