"""Part of a machine in a run over ssh: starts its ranks, and ends them when the connection ends.

`front.py` runs this on every machine and says what to do through standard input. The ranks run
in a session of their own, so that what belongs to the run, and nothing else, can be ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

from wire import GREETING, Kind, frame

ROOT = Path(__file__).resolve().parents[2]
CHUNK_BYTES = 1 << 16
MOST_UNSENT_BYTES = 1 << 20  # of output that the connection has not taken; then the ranks wait
TICK_SECONDS = 0.5
LEFT_OVER_SECONDS = 5.0  # for processes that outlive their run
PR_SET_PDEATHSIG = 1


class LinkLost(Exception):
    """Raised when the launching machine is gone or has been silent for too long."""


class Connection:
    """Standard input and output, as lines from and frames to the launching machine."""

    def __init__(self) -> None:
        self.lost = False
        self.silence_seconds = 60.0
        self._heard = self._said = time.monotonic()
        self._received = bytearray()
        self._unsent = bytearray()
        self.messages: deque[dict[str, Any]] = deque()  # that have come, and wait to be obeyed
        for fd in (0, 1):
            os.set_blocking(fd, False)

    @property
    def is_full(self) -> bool:
        """Tell whether more output has to wait."""
        return not self.lost and len(self._unsent) >= MOST_UNSENT_BYTES

    @property
    def has_unsent(self) -> bool:
        """Tell whether the connection has still to take something."""
        return not self.lost and bool(self._unsent)

    def send(self, data: bytes) -> None:
        """Send at once what goes, the rest later; nothing once the connection is lost."""
        if not self.lost:
            self._unsent += data
            self.flush()

    def flush(self) -> None:
        """Send what goes without waiting."""
        try:
            while self._unsent:
                self._said = time.monotonic()
                del self._unsent[: os.write(1, self._unsent[:CHUNK_BYTES])]
        except BlockingIOError:
            pass
        except OSError:
            self.lost = True

    def receive(self) -> None:
        """Take what has come, without waiting."""
        try:
            data = os.read(0, CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.lost = True
            return
        self._heard = time.monotonic()
        self._received += data
        *lines, rest = self._received.split(b"\n")
        self._received = bytearray(rest)
        self.messages += filter(None, map(json.loads, lines))  # an empty one says: I am here

    def keep_alive(self) -> None:
        """Say that this machine is there, and notice when the launching one is not."""
        now = time.monotonic()
        if now - self._said > self.silence_seconds / 6 and not self._unsent:
            self.send(frame(Kind.ALIVE))
        if now - self._heard > self.silence_seconds:
            self.lost = True

    def wait_for_message(self) -> dict[str, Any]:
        """Return the next message.

        Raises:
            LinkLost: there will be none.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(0, selectors.EVENT_READ)
            while not self.lost and not self.messages:
                if selector.select(TICK_SECONDS):
                    self.receive()
                self.flush()
                self.keep_alive()
        if not self.messages:
            raise LinkLost
        return self.messages.popleft()


def session_members(session: int) -> list[int]:
    """Return the processes of a session. Grows with the number of processes of the machine."""
    members = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError):
                # After the name, which may hold anything: state, parent, group, session.
                fields = Path("/proc", entry, "stat").read_bytes().rpartition(b")")[2].split()
                if int(fields[3]) == session and fields[0] != b"Z":
                    members.append(int(entry))
    return members


def rank_processes(pid: int) -> list[int]:
    """Return the nearest descendants of a process that were started as ranks."""
    found = []
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            environment = b"\0" + Path("/proc", child, "environ").read_bytes()
            if b"\0LOCAL_RANK=" in environment:
                found.append(int(child))
            else:
                found += rank_processes(int(child))
    return found


def addresses() -> list[str]:
    """Return the addresses of this machine."""
    with contextlib.suppress(OSError):
        done = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False)
        return done.stdout.split()
    return []


def end_with_parent(parent: int) -> None:
    """Have the system send TERM to this process, a new child, when its parent is killed."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # the parent's handlers would never be called here
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was killed before
        os._exit(1)


class Part:
    """Ranks of this machine: `multi_node.sh` with the machine's number starts and ends them."""

    def __init__(self, connection: Connection, job: dict[str, Any], master_addr: str) -> None:
        self._connection = connection
        self._job = job
        self._kill_at: float | None = None
        self._stopped = self._failed = False
        self._watched: set[int] = set()
        self._selector = selectors.DefaultSelector()
        self._wake, wake = os.pipe()
        for fd in (self._wake, wake):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # Signals are only counted where they come, which may be before there is a script or when it
        # has ended and its number belongs to another process.
        self._num_signals = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self._count_signal())
        self._script = self._start(master_addr)

    def _count_signal(self) -> None:
        self._num_signals += 1

    def _start(self, master_addr: str) -> subprocess.Popen[bytes]:
        folder = Path(self._job["folder"])
        (folder / "hostfile").write_text(self._job["hostfile"])
        return subprocess.Popen(
            ["bash", ROOT / "launch" / "multi_node.sh", folder / "hostfile", *self._job["words"]],
            env=os.environ
            | dict(setting.split("=", 1) for setting in self._job["environment"])
            | {
                "NODE_RANK": str(self._job["number"]),
                "MASTER_ADDR": master_addr,
                "MASTER_PORT": self._job["master_port"],
                "TASK": self._job["task"],
                "DSTRAIN_OVER_SSH": "1",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=functools.partial(end_with_parent, os.getpid()),  # there is one thread only
        )

    def run(self) -> int:
        """Carry output, signals and the end; return the exit status."""
        streams: dict[int, Kind] = {}
        assert self._script.stdout is not None
        assert self._script.stderr is not None
        streams[self._script.stdout.fileno()] = Kind.STDOUT
        streams[self._script.stderr.fileno()] = Kind.STDERR
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._selector.register(0, selectors.EVENT_READ)
        give_up_at: float | None = None  # on what has not ended with the script
        was_lost = False
        num_passed_on = 0
        while True:
            while num_passed_on < self._num_signals:
                num_passed_on += 1
                self._stop()
            if give_up_at is None and self._has_ended():
                give_up_at = time.monotonic() + LEFT_OVER_SECONDS
                self._end_left_overs()
            if give_up_at is not None and (
                time.monotonic() > give_up_at or not (streams or self._has_left_overs())
            ):
                break
            if give_up_at is not None and self._connection.is_full:
                # Their last words wait for somebody to read them.
                give_up_at = time.monotonic() + LEFT_OVER_SECONDS
                self._kill_at = self._kill_at and give_up_at - LEFT_OVER_SECONDS / 2
            self._choose(streams)
            for key, _ in self._selector.select(TICK_SECONDS):
                self._handle(key.fd, streams)
            while self._connection.messages:
                self._obey(self._connection.messages.popleft())
            self._connection.keep_alive()
            if self._connection.lost and not was_lost:
                was_lost = True
                self._selector.unregister(0)
                self._stop()
            if self._kill_at is not None and time.monotonic() > self._kill_at:
                self._kill_at = None
                self._kill(signal.SIGKILL)
            self._watch_ranks()
        status = self._script.wait()
        return status if status >= 0 else 128 - status

    def _has_ended(self) -> bool:
        """Tell whether the script has ended; as a zombie it stays, so its number is not reused."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        ended = os.waitid(os.P_PID, self._script.pid, options)
        self._failed = ended is not None and (
            ended.si_code != os.CLD_EXITED or ended.si_status != 0
        )
        return ended is not None

    def _choose(self, streams: dict[int, Kind]) -> None:
        """Wait for output while there is room, and for the connection while it has unsent bytes."""
        registered = self._selector.get_map()
        for fd in streams:
            if self._connection.is_full and fd in registered:
                self._selector.unregister(fd)
            elif not self._connection.is_full and fd not in registered:
                self._selector.register(fd, selectors.EVENT_READ)
        if self._connection.has_unsent and 1 not in registered:
            self._selector.register(1, selectors.EVENT_WRITE)
        elif not self._connection.has_unsent and 1 in registered:
            self._selector.unregister(1)

    def _handle(self, fd: int, streams: dict[int, Kind]) -> None:
        if fd == 0:
            self._connection.receive()
        elif fd == 1:
            self._connection.flush()
        elif fd == self._wake:
            with contextlib.suppress(BlockingIOError):
                os.read(fd, CHUNK_BYTES)
        elif fd in streams:
            data = os.read(fd, CHUNK_BYTES)
            if data:
                self._connection.send(frame(streams[fd], data))
            else:
                self._selector.unregister(fd)
                del streams[fd]
        elif fd in self._watched:
            self._selector.unregister(fd)
            self._connection.send(frame(Kind.RANK_ENDED))

    def _obey(self, message: dict[str, Any]) -> None:
        if "signal" in message:
            self._stopped = True
            self._signal(signal.Signals[message["signal"]])
        elif "kill" in message:
            self._kill(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        """Signal the script, which passes it on to the ranks in its way."""
        os.kill(self._script.pid, number)

    def _stop(self) -> None:
        """Let the ranks save and end, within the time that a run has for it."""
        self._stopped = True
        self._signal(signal.SIGTERM)
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._job["stop_seconds"]

    def _kill(self, number: int) -> None:
        """Signal all processes of the run on this machine."""
        for pid in session_members(self._script.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _end_left_overs(self) -> None:
        """End what is left of a run that was stopped or failed.

        What a run that ended well leaves behind is the user's.
        """
        self._kill_at = None
        if self._failed or self._stopped:
            self._kill(signal.SIGTERM)
            self._kill_at = time.monotonic() + LEFT_OVER_SECONDS / 2

    def _has_left_overs(self) -> bool:
        return (self._failed or self._stopped) and bool(session_members(self._script.pid))

    def _watch_ranks(self) -> None:
        """Watch the processes of the ranks, so that their end is noticed at once.

        The launcher looks once a second, which would hide whose ranks ended first.
        """
        if len(self._watched) >= self._job["slots"]:
            return
        ranks = rank_processes(self._script.pid)
        if len(ranks) == self._job["slots"] and not self._watched:
            for pid in ranks:
                with contextlib.suppress(OSError):
                    fd = os.pidfd_open(pid)
                    self._watched.add(fd)
                    self._selector.register(fd, selectors.EVENT_READ)


def main() -> int:
    """Send the greeting, wait until all machines are ready, and run this machine's part."""
    connection = Connection()
    connection.send(GREETING)
    try:
        job = connection.wait_for_message()
        connection.silence_seconds = job["link_seconds"]
        ready = {"addresses": addresses() if job["number"] == 0 else []}
        connection.send(frame(Kind.READY, json.dumps(ready).encode()))
        master_addr = connection.wait_for_message()["go"]
    except LinkLost:
        return 1
    with tempfile.TemporaryDirectory(prefix="dstrain-") as folder:
        status = Part(connection, job | {"folder": folder}, master_addr).run()
    connection.send(frame(Kind.STATUS, json.dumps(status).encode()))
    with selectors.DefaultSelector() as selector:
        selector.register(1, selectors.EVENT_WRITE)
        while connection.has_unsent:
            selector.select(TICK_SECONDS)
            connection.flush()
            connection.keep_alive()
    return status


if __name__ == "__main__":
    sys.exit(main())
