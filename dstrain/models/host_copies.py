"""Copies of tensors in reused host memory, which training cannot change."""

from __future__ import annotations

import torch


class HostCopies:
    """Makes copies of tensors by name, in memory that is reused from one round to the next.

    Allocating memory costs more than copying: the system clears every page, and pins it for copies
    from a device. So a second round of the same tensors overwrites the copies of the first.
    """

    def __init__(self) -> None:
        """Begin without any memory."""
        self._kept: dict[str, torch.Tensor] = {}
        self._used: set[str] = set()
        self._unfinished = False

    def begin(self) -> None:
        """Begin a new round, which may overwrite the copies of earlier rounds."""
        self._used = set()

    def copy(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy of a tensor.

        A copy from a device is complete only after ``wait``.

        Args:
            name: a name that is unique in the round.
            values: the tensor, on any device.
        """
        assert name not in self._used, name
        self._used.add(name)
        values = values.detach()
        on_device = values.device.type != "cpu"
        host = self._kept.get(name)
        if host is None or host.shape != values.shape or host.dtype != values.dtype:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=on_device)
            self._kept[name] = host
        self._unfinished |= on_device
        return host.copy_(values, non_blocking=on_device)

    def wait(self) -> None:
        """Wait until copies from a device, which run asynchronously, are complete."""
        if self._unfinished:
            torch.accelerator.synchronize()
            self._unfinished = False

    def end(self) -> None:
        """Wait for the copies of this round, and free memory that the round has not used."""
        self.wait()
        for name in self._kept.keys() - self._used:
            del self._kept[name]

    def free(self) -> None:
        """Free all memory."""
        self._kept.clear()
