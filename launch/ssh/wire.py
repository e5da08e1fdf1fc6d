"""Messages between the two ends of an ssh connection, `front.py` here and `on_host.py` there.

From the launching machine: one JSON value a line, in ASCII. From the other machine: `GREETING`,
before which the output of login scripts may come, then frames: a kind, a length and so many bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

GREETING = b"\0dstrain 1\0"
NO_REPOSITORY = 96  # the exit status of a machine without repository or environment
_HEADER = struct.Struct("!BI")


class Kind(IntEnum):
    """Content of a frame."""

    ALIVE = 0  # nothing: the machine is there
    STDOUT = 1
    STDERR = 2
    READY = 3  # JSON: the machine's addresses, where they were asked for
    RANK_ENDED = 4  # nothing: one of its ranks has ended, with whatever status
    STATUS = 5  # JSON: the exit status of its part of the run


def message(value: Any) -> bytes:
    """Encode a line for the other machine. Names that are no UTF-8 survive as lone surrogates."""
    return json.dumps(value).encode("ascii") + b"\n"


def frame(kind: Kind, payload: bytes = b"") -> bytes:
    """Encode a frame for the launching machine."""
    return _HEADER.pack(kind, len(payload)) + payload


class FrameReader:
    """Takes bytes as they come and gives whole frames; what precedes the greeting is output."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._greeted = False

    def feed(self, data: bytes) -> Iterator[tuple[Kind, bytes]]:
        """Yield the frames that ``data`` completes."""
        self._bytes += data
        if not self._greeted:
            before, found, after = self._bytes.partition(GREETING)
            if not found:
                return
            self._greeted, self._bytes = True, after
            if before:
                yield Kind.STDOUT, bytes(before)
        while len(self._bytes) >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._bytes)
            end = _HEADER.size + length
            if len(self._bytes) < end:
                return
            payload = bytes(self._bytes[_HEADER.size : end])
            del self._bytes[:end]
            yield Kind(kind), payload

    def rest(self) -> bytes:
        """Return what came of a connection that ended before the greeting."""
        return b"" if self._greeted else bytes(self._bytes)
