"""A machine of the hostfile, and the ssh process that reaches it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from typing import Any

from output import OUTPUTS, Lines
from wire import FrameReader, Kind

CHUNK_BYTES = 1 << 16
LOST = 255  # the exit status of ssh where the connection breaks


class Machine:
    """A machine of the hostfile, and the ssh process that reaches it."""

    def __init__(self, name: str, slots: int, first_rank: int) -> None:
        self.name = name
        self.slots = slots
        self.first_rank = first_rank
        self.ready: dict[str, Any] | None = None
        self.status: int | None = None  # of its part of the run, by its own word
        self.process: subprocess.Popen[bytes] | None = None
        self.ended_at: float | None = None  # the process, and all that it had to say was read
        self.exited_at: float | None = None  # the process
        self.rank_ended_at: float | None = None  # the first of its ranks
        self.heard_at = 0.0
        self.silent_seconds: float | None = None  # after which it was given up
        self._frames = FrameReader()
        self._unsent = bytearray()
        self.lines = {1: Lines(name, OUTPUTS[1]), 2: Lines(name, OUTPUTS[2])}
        self.open_fds: set[int] = set()

    @property
    def ranks(self) -> str:
        """Return the ranks of this machine, in words."""
        last = self.first_rank + self.slots - 1
        return f"rank {last}" if self.slots == 1 else f"ranks {self.first_rank} to {last}"

    @property
    def is_connecting(self) -> bool:
        """Tell whether the connection is still being made: it has neither failed nor reported."""
        return self.process is not None and self.ready is None and self.ended_at is None

    @property
    def exit_status(self) -> int:
        """Return the status of its part of the run; `LOST` if the connection ended before that."""
        return LOST if self.status is None else self.status

    @property
    def failed_at(self) -> float:
        """Return when its part of the run failed, as well as is known here."""
        assert self.ended_at is not None
        return self.ended_at if self.rank_ended_at is None else self.rank_ended_at

    def connect(self, command: list[str], first: bytes) -> None:
        """Start ssh, in a session of its own: signals of a terminal go to this process only."""
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
        self.heard_at = time.monotonic()
        self.send(first)

    def fd(self, stream: int) -> int:
        """Return the pipe to (0) or from (1, 2) ssh."""
        assert self.process is not None
        pipe = (self.process.stdin, self.process.stdout, self.process.stderr)[stream]
        assert pipe is not None
        return pipe.fileno()

    @property
    def has_unsent(self) -> bool:
        """Tell whether ssh has still to take something."""
        return bool(self._unsent)

    def send(self, data: bytes) -> None:
        """Send now what goes and keep the rest."""
        self._unsent += data
        self.flush()

    def flush(self) -> None:
        """Send what goes without waiting."""
        assert self.process is not None
        if self.process.stdin is None or self.process.stdin.closed:
            return
        try:
            while self._unsent:
                del self._unsent[: os.write(self.fd(0), self._unsent[:CHUNK_BYTES])]
        except BlockingIOError:
            pass
        except OSError:  # ssh has ended, which is noticed elsewhere
            self._unsent.clear()

    def receive(self, stream: int) -> bool:
        """Read what has come and act on it; return whether there may be more."""
        try:
            data = os.read(self.fd(stream), CHUNK_BYTES)
        except BlockingIOError:
            return True
        if not data:
            return False
        if stream == 2:
            self.lines[2].put(data)
            return True
        self.heard_at = time.monotonic()
        for kind, payload in self._frames.feed(data):
            if kind in (Kind.STDOUT, Kind.STDERR):
                self.lines[int(kind)].put(payload)
            elif kind == Kind.READY:
                self.ready = json.loads(payload)
            elif kind == Kind.RANK_ENDED and self.rank_ended_at is None:
                self.rank_ended_at = self.heard_at
            elif kind == Kind.STATUS:
                self.status = json.loads(payload)
        return True

    def end(self) -> None:
        """Close what belongs to the process, which has ended."""
        assert self.process is not None
        self.lines[1].put(self._frames.rest())
        for lines in self.lines.values():
            lines.end()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        self.ended_at = time.monotonic()
