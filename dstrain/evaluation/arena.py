"""Memory outside the heap for predictions that stay, to keep the heap from fragmenting.

Small arrays that stay would be allocated in gaps that large tensors leave, so that the next large
tensor no longer fits: without this, the heap of a process that collects predictions grew by an
eighth of the data that passed through it.
"""

from __future__ import annotations

import ctypes
import mmap
import time

import numpy as np
import torch

_CHUNK_BYTES = 2**20
_ALIGNMENT = 64
_TRIM_SECONDS = 1.0
_TRIM_SHARE = 0.02  # largest share of time for trimming, when the heap is large


class Arena:
    """Allocator for copies of arrays; small copies share a chunk, which is freed with the last."""

    def __init__(self) -> None:
        """Set up without memory."""
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def copied(self, block: np.ndarray) -> np.ndarray:
        """Return a copy of an array, outside the heap."""
        if not block.nbytes:
            return block.copy()
        if self._chunk is None or self._used + block.nbytes > len(self._chunk):
            self._chunk = _memory(max(_CHUNK_BYTES, block.nbytes))
            self._used = 0
        copy = np.frombuffer(self._chunk, block.dtype, block.size, self._used)
        copy = copy.reshape(block.shape)
        copy[...] = block
        self._used += -(-block.nbytes // _ALIGNMENT) * _ALIGNMENT
        return copy


class Scratch:
    """Buffer outside the heap that is reused for one tensor after another."""

    def __init__(self) -> None:
        """Set up without memory."""
        self._memory: mmap.mmap | None = None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor in the buffer; it overwrites the previous one."""
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        if self._memory is None or len(self._memory) < size:
            self._memory = _memory(size)
        return torch.frombuffer(self._memory, dtype=dtype, count=count).reshape(shape)


class Heap:
    """Heap of the process, whose free memory is returned to the system if the C library can."""

    def __init__(self) -> None:
        """Look up the function of the C library."""
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        self._due = time.monotonic() + _TRIM_SECONDS

    def release(self) -> None:
        """Return free memory to the system, unless that was done a moment ago."""
        started = time.monotonic()
        if self._trim is None or started < self._due:
            return
        self._trim(0)
        now = time.monotonic()
        self._due = now + max(_TRIM_SECONDS, (now - started) / _TRIM_SHARE)


def _memory(num_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
