"""Access to the places in which a module registers its buffers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Slot:
    """A place in which a module registers a buffer; the model may replace the tensor there.

    Attributes:
        name: full name of the buffer in the outermost module.
        owner: the submodule that registers the buffer.
        key: name of the buffer in ``owner``.
        persistent: whether the buffer is in the ``state_dict``.
    """

    name: str
    owner: torch.nn.Module
    key: str
    persistent: bool

    @property
    def tensor(self) -> torch.Tensor:
        """Return the buffer's present tensor, which must not be None."""
        tensor = self.owner._buffers[self.key]
        assert tensor is not None
        return tensor

    @property
    def is_empty(self) -> bool:
        """Tell whether the buffer is registered as None."""
        return self.owner._buffers[self.key] is None

    @torch.no_grad()
    def put(self, values: torch.Tensor) -> None:
        """Set the buffer's values; in place if the shape is the same, else in a new tensor.

        Keeps the buffer's number format and device.
        """
        present = self.tensor
        in_place = present.shape == values.shape and not present.is_inference()
        if in_place and not _overlaps(present):
            present.detach().copy_(values)
        else:
            self.owner._buffers[self.key] = values.to(present.device, present.dtype, copy=True)

    @torch.no_grad()
    def replace(self, values: torch.Tensor | None) -> None:
        """Set the buffer to values in their shape and number format; in place if the buffer fits.

        Args:
            values: None registers the buffer as None.
        """
        present = self.owner._buffers[self.key]
        if values is None:
            self.owner._buffers[self.key] = None
        elif present is None:
            from dstrain.engine.process_group import device_name

            self.owner._buffers[self.key] = values.to(device_name(), copy=True)
        elif present.dtype == values.dtype:
            self.put(values)
        else:
            self.owner._buffers[self.key] = values.to(present.device, copy=True)


def slots_of(module: torch.nn.Module) -> list[Slot]:
    """Return the slots of all buffers of a module; of a shared buffer only the first."""
    found: dict[int, Slot] = {}
    for slot in _places(module):
        if not slot.is_empty and _is_plain(slot.tensor):
            found.setdefault(id(slot.tensor), slot)
    return list(found.values())


def _places(module: torch.nn.Module) -> Iterator[Slot]:
    """Yield every slot of a module and its submodules."""
    for path, owner in module.named_modules():
        for key in owner._buffers:
            name = f"{path}.{key}" if path else key
            yield Slot(name, owner, key, key not in owner._non_persistent_buffers_set)


def empty_slots_of(module: torch.nn.Module) -> list[Slot]:
    """Return the slots of registered buffers that are None now."""
    return [slot for slot in _places(module) if slot.is_empty]


def _is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has elements in memory that can be viewed as bytes."""
    dense = tensor.layout == torch.strided and not tensor.is_quantized
    return dense and tensor.device.type != "meta"


def _overlaps(tensor: torch.Tensor) -> bool:
    """Tell whether elements of a tensor share memory, as after ``expand``."""
    return any(
        n > 1 and not stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
