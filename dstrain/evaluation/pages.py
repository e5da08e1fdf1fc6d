"""Pages of mapped files: given back while something reads a large map from end to end."""

from __future__ import annotations

import contextlib
import mmap
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

_SECONDS = 0.003  # between two times; in it a core reads some 10 MB
_SHARE = 0.05  # of this process's time that may go into it, where there are thousands of maps


@contextlib.contextmanager
def releasing_pages(*values: Any) -> Iterator[None]:
    """Return pages of memory maps to the system inside, so that they do not pile up.

    What is read of a map stays in the process until the system wants the memory, and whoever looks
    at the process (a batch system with a limit, say) takes it for used. Nothing is lost: what was
    changed is in the file, and what is read again comes from the system's cache. There is no limit
    that the system could be told, so a thread does it all the time; how much is there at the most
    is what the reader reads until that thread gets a core.

    Args:
        *values: arrays, in tuples, lists and dicts; those that are no memory maps do not matter.
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
