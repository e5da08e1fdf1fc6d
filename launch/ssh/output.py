"""Output of a run on several machines: lines, each with its machine's name before it."""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable

CHUNK_BYTES = 1 << 16
LONGEST_LINE_BYTES = 1 << 20
RETRY_SECONDS = 1.0


class Output(threading.Thread):
    """Writes to a file descriptor that may block for long (a pager, Ctrl-S), or lose its reader.

    Only this thread waits for it, as the connections need to be kept alive meanwhile.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(daemon=True)
        self._fd = fd
        self._changed = threading.Condition()
        self._parts: deque[bytes] = deque()
        self._closed = False
        self.size = 0

    def put(self, data: bytes) -> None:
        """Write this next."""
        with self._changed:
            self._parts.append(data)
            self.size += len(data)
            self._changed.notify()

    def close(self) -> None:
        """End when everything is written."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def run(self) -> None:
        """Write what comes, to the end (the thread's own function)."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._parts or self._closed)
                if not self._parts:
                    return
                data = b"".join(self._parts)
                self._parts.clear()
            self._write(data)
            with self._changed:
                self.size -= len(data)

    def _write(self, data: bytes) -> None:
        """Write all; drop it where there is no reader any more."""
        while data:
            try:
                data = data[os.write(self._fd, data[:CHUNK_BYTES]) :]
            except BlockingIOError:
                select.select([], [self._fd], [], RETRY_SECONDS)
            except OSError:
                return


OUTPUTS = {1: Output(1), 2: Output(2)}


def say(text: str) -> None:
    """Tell the user something, as the scripts do."""
    OUTPUTS[2].put(f"[dstrain] {text}\n".encode(errors="surrogateescape"))


def write_all(*, until: Callable[[], bool]) -> None:
    """Wait until all output is written, or ``until`` is true."""
    for output in OUTPUTS.values():
        output.close()
    while any(output.is_alive() for output in OUTPUTS.values()) and not until():
        OUTPUTS[1].join(0.1)
        OUTPUTS[2].join(0.1)


class Lines:
    """Cuts the output of a machine into lines, each with the machine's name before it."""

    def __init__(self, name: str, output: Output) -> None:
        self._prefix = os.fsencode(name) + b": "
        self._output = output
        self._begun = b""

    def put(self, data: bytes) -> None:
        """Write the lines that are complete."""
        *lines, self._begun = (self._begun + data).split(b"\n")
        if len(self._begun) > LONGEST_LINE_BYTES:
            lines.append(self._begun)
            self._begun = b""
        if lines:
            self._output.put(b"".join(self._prefix + line + b"\n" for line in lines))

    def end(self) -> None:
        """Write what no end of a line has come for."""
        if self._begun:
            self.put(b"\n")
