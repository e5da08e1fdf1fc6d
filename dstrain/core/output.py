"""Dropping of printed output that cannot be written, so that it does not end a run.

`... | head` closes a pipe, a terminal goes away, the disk of a log fills up: none of these is a
reason to lose a run. Python would raise in the next line that prints, such as a progress bar's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import Any

_READER_LEFT = (errno.EPIPE, errno.ECONNRESET)
_MARK = "_dstrain_drops"


def drop_what_cannot_be_written() -> None:
    """Make writes to stdout and stderr of this process drop their data where they would fail.

    Replaces the ``write`` method of the raw file object under each stream, so that all holders of
    the stream (handlers of logging, progress bars, a user's wrapper) are covered. Streams of
    another kind, such as a notebook's, are left alone. May be called again, as streams may be
    replaced.
    """
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)  # under `python -u` the buffer itself is raw
        if raw is None or getattr(raw, _MARK, False):
            continue
        with contextlib.suppress(OSError, ValueError, AttributeError):  # not a file, or closed
            number = raw.fileno()
            raw.write = _dropping(raw.write, number)
            setattr(raw, _MARK, True)


def _dropping(write: Callable[[Any], int | None], number: int) -> Callable[[Any], int | None]:
    """Wrap ``write`` of the file descriptor ``number`` to drop what the system cannot write."""

    def write_or_drop(data: Any) -> int | None:
        try:
            return write(data)
        except OSError as error:
            if error.errno in _READER_LEFT:
                _write_to_nowhere(number)
            return memoryview(data).nbytes

    return write_or_drop


def _write_to_nowhere(number: int) -> None:
    """Replace a pipe without a reader by /dev/null, for libraries and child processes too.

    Rank 0 prints a note on the remaining stream: on stderr for stdout, and on stdout for stderr.
    """
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
    other = {1: 2, 2: 1}.get(number)
    if other is not None and os.environ.get("RANK", "0") == "0":
        name = {1: "stdout", 2: "stderr"}[number]
        told = f"dstrain: nobody reads {name} any more: the run goes on without it\n"
        with contextlib.suppress(OSError):
            os.write(other, told.encode())
