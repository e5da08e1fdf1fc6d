"""Values that DeepSpeed keeps in files on a local disk (NVMe offload), by ranges of elements.

DeepSpeed has one file for each tensor of a sub-group (master weights and each kind of optimizer
state), and one for each parameter's partition; the elements begin at the file's first byte.
Between steps the files are complete and the tensors empty. Here they are read and written in
place, so that a checkpoint needs no more host memory than the range that is copied, and no
sub-group has to be read whole for one parameter. DeepSpeed's direct reads see what was written
through the page cache, and the other way round.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class SwapFile:
    """A 1-D tensor in a file of DeepSpeed's.

    Attributes:
        path: the file.
        dtype: number format of the elements.
    """

    path: Path
    dtype: torch.dtype

    def read(self, start: int, numel: int) -> torch.Tensor:
        """Return ``numel`` elements from element ``start`` on, in new host memory.

        Raises:
            OSError: the file cannot be read, or ends before that.
        """
        values = torch.empty(numel, dtype=self.dtype)
        rest = _bytes(values)
        position = start * self.dtype.itemsize
        with self.path.open("rb", buffering=0) as file:
            while rest:
                count = os.preadv(file.fileno(), [rest], position)
                if not count:
                    raise OSError(f"{self.path} ends at byte {position}")
                position, rest = position + count, rest[count:]
        return values

    def write(self, start: int, values: torch.Tensor) -> None:
        """Write elements from element ``start`` on.

        Args:
            start: index of the first element.
            values: 1-D, in any number format and on any device.

        Raises:
            OSError: the disk is full, and so on.
        """
        values = values.detach().to("cpu", self.dtype).contiguous()
        rest = _bytes(values)
        position = start * self.dtype.itemsize
        with self.path.open("r+b", buffering=0) as file:
            while rest:
                count = os.pwrite(file.fileno(), rest, position)
                position, rest = position + count, rest[count:]

    def copied(self, start: int, numel: int) -> torch.Tensor:
        """Return a copy of elements that takes disk instead of memory, beside this file.

        The copy is mapped from a file without a name, whose space is freed with the tensor.
        """
        with tempfile.NamedTemporaryFile(dir=self.path.parent) as file:
            size = max(1, numel) * self.dtype.itemsize
            os.ftruncate(file.fileno(), size)
            copy = torch.from_file(file.name, shared=True, size=max(1, numel), dtype=self.dtype)
        for low in range(0, numel, _CHUNK_NUMEL):
            count = min(_CHUNK_NUMEL, numel - low)
            copy[low : low + count] = self.read(start + low, count)
        return copy[:numel]


def _bytes(values: torch.Tensor) -> memoryview:
    """Return the memory of a 1-D tensor in host memory."""
    array: Any = values.view(torch.uint8).numpy()
    return memoryview(array)


_CHUNK_NUMEL = 8 * 2**20


class Swapped(Protocol):
    """Tensors that DeepSpeed keeps in files."""

    def file(self, tensor: torch.Tensor) -> SwapFile | None:
        """Return the file of a tensor; None if the tensor is in memory."""

    def add_state(self, state: dict[str, Any], dtypes: dict[str, torch.dtype]) -> None:
        """Add tensors of zeros to optimizer state, in new files."""


class SwappedSubGroup:
    """The optimizer's tensors of a sub-group of stage 3 that are offloaded to disk."""

    def __init__(self, swapper: Any, holder: torch.Tensor) -> None:
        """Refer to a sub-group.

        Args:
            swapper: DeepSpeed's swapper of optimizer tensors.
            holder: DeepSpeed's tensor of the sub-group's master weights, empty between steps.
        """
        self._swapper, self._holder = swapper, holder

    def file(self, tensor: torch.Tensor) -> SwapFile | None:
        """Return the file of the master weights or of a state tensor; None if it is in memory."""
        for swapped in self._info.tensors:
            if swapped.compute_tensor is tensor:
                return SwapFile(Path(swapped.swap_path), self._swapper.dtype)
        return None

    def add_state(self, state: dict[str, Any], dtypes: dict[str, torch.dtype]) -> None:
        """Add tensors of zeros to the optimizer's state of the sub-group, in new files.

        Args:
            state: the state, which has no tensors in files yet.
            dtypes: key of each new tensor -> number format.
        """
        info = self._info
        for key, dtype in dtypes.items():
            # Of full size without memory, since DeepSpeed keeps small tensors in memory.
            state[key] = torch.zeros((), dtype=dtype).expand(info.numel())
        self._swapper._update_param_state_info(info, self._holder)
        size = self._swapper._io_aligned_numel(info.numel()) * self._swapper.swap_element_size
        for swapped in info.tensors[1:]:
            with open(swapped.swap_path, "wb") as file:
                file.truncate(size)
        info.release_memory()

    @property
    def _info(self) -> Any:
        """Return DeepSpeed's record of the sub-group's files."""
        return self._swapper.swap_params_info[self._swapper.parameter_id(self._holder)]


class SwappedParameter:
    """A parameter's partition that is offloaded to disk."""

    def __init__(self, parameter: Any) -> None:
        """Refer to a parameter whose partition is in a file."""
        self._parameter = parameter

    def file(self, tensor: torch.Tensor) -> SwapFile | None:
        """Return the file of the partition."""
        swapper = self._parameter.nvme_swapper
        return SwapFile(Path(swapper.get_path(self._parameter, must_exist=True)), swapper.dtype)

    def add_state(self, state: dict[str, Any], dtypes: dict[str, torch.dtype]) -> None:
        """Do nothing: no optimizer updates the parameter."""


@contextlib.contextmanager
def sub_group_in_memory(optimizer: Any, index: int) -> Iterator[None]:
    """Have the tensors of a sub-group in DeepSpeed's buffers inside; changes are discarded.

    Args:
        optimizer: DeepSpeed's wrapper at stage 3.
        index: of the sub-group; one that is not offloaded to disk is in memory anyway.
    """
    if not optimizer._swappable_optimizer_subgroup(index):
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(index)
    try:
        yield
    finally:
        optimizer._release_swap_buffers(index)
