"""Releasing pages of memory-mapped files while a large map is read from end to end."""

from __future__ import annotations

import contextlib
import mmap
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

_SECONDS = 0.003  # between two releases; a core reads some 10 MB in it
_SHARE = 0.05  # largest share of time for releases, when there are thousands of maps


@contextlib.contextmanager
def releasing_pages(*values: Any) -> Iterator[None]:
    """Release pages of memory maps to the system during the body, so that they do not accumulate.

    Pages of a map that were read stay in the process until the system needs the memory, and count
    as used memory of the process (for a batch system with a limit, say). Nothing is lost: changes
    are in the file, and pages read again come from the system's cache. The system has no setting
    to limit such pages, so a thread releases them continuously; at most as much is resident as the
    reader reads until that thread runs.

    Args:
        *values: arrays, in tuples, lists and dicts; arrays that are no memory maps are ignored.
    """
    maps = [m for array in _arrays(values) if (m := getattr(array, "_mmap", None)) is not None]
    if not maps or not hasattr(mmap, "MADV_DONTNEED"):
        yield
        return
    done = threading.Event()

    def release() -> None:
        pause = _SECONDS
        while not done.wait(pause):
            started = time.perf_counter()
            for pages in maps:
                pages.madvise(mmap.MADV_DONTNEED)
            pause = max(_SECONDS, (time.perf_counter() - started) / _SHARE)

    thread = threading.Thread(target=release, name="predictions", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _arrays(value: Any) -> Iterator[np.ndarray]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _arrays(part)
    elif isinstance(value, Mapping):
        yield from _arrays(list(value.values()))
