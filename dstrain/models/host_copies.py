"""Copies of tensors in host memory, so that training can change what they were made of."""

from __future__ import annotations

import torch


class HostCopies:
    """Copies by name, in memory that is kept from one round to the next.

    New memory costs more than the copy: the system clears every page of it, and pins it for a
    device. So a second round of the same tensors overwrites the first one's copies.
    """

    def __init__(self) -> None:
        """Begin with nothing copied."""
        self._kept: dict[str, torch.Tensor] = {}
        self._used: set[str] = set()
        self._unfinished = False

    def begin(self) -> None:
        """Begin a new round: copies of earlier ones may be overwritten."""
        self._used = set()

    def copy(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy; one from a device has arrived once ``wait`` returns.

        Args:
            name: unique in the round.
            values: of any shape, on any device.
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
        """Wait until all copies have arrived: those from a device run beside this thread."""
        if self._unfinished:
            torch.accelerator.synchronize()
            self._unfinished = False

    def end(self) -> None:
        """End the round: wait, and free the memory of copies that it did not use."""
        self.wait()
        for name in self._kept.keys() - self._used:
            del self._kept[name]

    def free(self) -> None:
        """Free all memory."""
        self._kept.clear()
