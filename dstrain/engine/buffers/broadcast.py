"""Broadcast of buffers in forms (shape and number format) on which all ranks have agreed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dstrain.core.ranks import is_distributed
from dstrain.engine.buffers.slots import Slot

Form = tuple[tuple[int, ...], torch.dtype | None]
"""Shape and number format of a buffer; ``EMPTY`` for a registered buffer that is None."""
EMPTY: Form = ((), None)


def form_of(slot: Slot) -> Form:
    """Return the present shape and number format of a buffer."""
    if slot.is_empty:
        return EMPTY
    return tuple(slot.tensor.shape), slot.tensor.dtype


@dataclass(frozen=True)
class _AgreedBuffer:
    """A buffer with the form in which all ranks send it."""

    slot: Slot
    form: Form

    @property
    def holds(self) -> bool:
        """Tell whether the buffer still has the agreed form on this rank."""
        return form_of(self.slot) == self.form

    @property
    def num_bytes(self) -> int:
        """Return the number of bytes that are sent for the buffer."""
        shape, dtype = self.form
        return 0 if dtype is None else torch.Size(shape).numel() * dtype.itemsize

    def bytes_on(self, device: str) -> torch.Tensor:
        """Return the buffer's elements as bytes; as many zeros if it has another form now."""
        if not self.holds or not self.num_bytes:
            return torch.zeros(self.num_bytes, dtype=torch.uint8, device=device)
        return self.slot.tensor.detach().reshape(-1).view(torch.uint8).to(device)

    def put(self, values: torch.Tensor) -> None:
        """Set the buffer's elements from bytes."""
        shape, dtype = self.form
        assert dtype is not None
        self.slot.put(values.view(dtype).view(shape))


class BroadcastBuffers:
    """Sends the main rank's buffers to all other ranks, in forms that are the same on all ranks.

    A model may change the form of a buffer at any time, and on any rank. The message keeps the
    agreed length. A rank whose buffer has another form keeps its values. If that happens on the
    main rank, all ranks keep theirs. This lasts until the caller makes ranks agree on new forms;
    ``deviating`` names the buffers for which that is due.
    """

    def __init__(self, slots: Iterable[Slot] = ()) -> None:
        """Take the present forms of the buffers as agreed; they must be equal on all ranks."""
        agreed = [_AgreedBuffer(slot, form_of(slot)) for slot in slots]
        # The widest first, so that each tensor begins at a multiple of its width.
        self._agreed = sorted(agreed, key=lambda one: -_width(one.form))
        self._lengths: torch.Tensor | None = None

    def __iter__(self) -> Iterator[Slot]:
        """Yield the buffers."""
        return (one.slot for one in self._agreed)

    def __len__(self) -> int:
        """Count the buffers."""
        return len(self._agreed)

    def deviating(self) -> list[str]:
        """Return the names of buffers that no longer have the agreed form on this rank."""
        return [one.slot.name for one in self._agreed if not one.holds]

    @torch.no_grad()
    def send(self) -> None:
        """Send all ranks the main rank's values in one broadcast; a collective of all ranks.

        The host does not wait for the device. The time grows with the number of buffers and their
        bytes.
        """
        total = sum(one.num_bytes for one in self._agreed)
        if not total or not is_distributed():
            return
        import torch.distributed as dist

        from dstrain.engine.process_group import device_name

        device = device_name()
        held = [one.holds for one in self._agreed]
        # After the values comes a flag for each buffer: whether its values were sent.
        flags = _on(device, [int(holds) for holds in held], torch.uint8)
        present = torch.cat([*(one.bytes_on(device) for one in self._agreed), flags])
        flat = present.clone()
        dist.broadcast(flat, src=0)
        if dist.get_rank() == 0:
            return
        if self._lengths is None:
            self._lengths = _on(device, [one.num_bytes for one in self._agreed], torch.int64)
        # Selects on the device, so that the host need not wait for the main rank's flags.
        sent = flat[total:].repeat_interleave(self._lengths, output_size=total)
        values = torch.where(sent.bool(), flat[:total], present[:total])
        start = 0
        for one, holds in zip(self._agreed, held, strict=True):
            stop = start + one.num_bytes
            if holds and one.num_bytes:
                one.put(values[start:stop])
            start = stop


def _width(form: Form) -> int:
    """Return the bytes of an element."""
    return 0 if form[1] is None else form[1].itemsize


def _on(device: str, numbers: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of numbers on a device, without waiting for the device."""
    values = torch.tensor(numbers, dtype=dtype)
    if device.startswith("cuda"):
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
