"""Memory beside the heap, for what stays while large tensors come and go.

Small arrays that stay would come to lie in the gaps that large tensors leave, so that the next
large one does not fit there any more: the heap of a process that collects grew by an eighth of all
that went through it.
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
_TRIM_SHARE = 0.02  # of the time that may go into it, where the heap is large


class Arena:
    """A store of copies of arrays: many small ones share a piece of memory, freed with the last."""

    def __init__(self) -> None:
        """Begin empty."""
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def copied(self, block: np.ndarray) -> np.ndarray:
        """Return a copy of the array that stays."""
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
    """A piece of memory that is used again and again."""

    def __init__(self) -> None:
        """Begin without memory."""
        self._memory: mmap.mmap | None = None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor in this memory, in place of the one before."""
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        if self._memory is None or len(self._memory) < size:
            self._memory = _memory(size)
        return torch.frombuffer(self._memory, dtype=dtype, count=count).reshape(shape)


class Heap:
    """The process's heap, whose gaps are freed now and then, where the C library can."""

    def __init__(self) -> None:
        """Begin with nothing freed."""
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        self._due = time.monotonic() + _TRIM_SECONDS

    def release(self) -> None:
        """Return gaps to the system, unless that was done a moment ago."""
        started = time.monotonic()
        if self._trim is None or started < self._due:
            return
        self._trim(0)
        now = time.monotonic()
        self._due = now + max(_TRIM_SECONDS, (now - started) / _TRIM_SHARE)


def _memory(num_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
