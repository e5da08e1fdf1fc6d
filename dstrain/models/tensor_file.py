"""Writing and reading of safetensors files piece by piece, never a whole file in memory.

``safetensors.torch.save_file`` turns all tensors into bytes before it writes the first; and memory
that ``safe_open`` maps counts as memory of the process while the file is open. The format: eight
bytes with the length of the header, the header in JSON, then one tensor after another
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, with_config

from dstrain.core.documents import Count, Shape, Text, parsed, typed
from dstrain.core.files import DurableFile, FileRecord

_DTYPES = {
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
# Most bytes of a header; safetensors has the same limit.
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Stored:
    """A tensor to be written into a file.

    Attributes:
        name: its key in the file.
        shape: its shape in the file.
        dtype: its number format, also in the file.
        load: returns the values, of any shape with as many elements, on any device.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor] = field(repr=False)

    @staticmethod
    def of(name: str, tensor: torch.Tensor) -> Stored:
        """Return an entry for a tensor that is in memory already."""
        return Stored(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def num_bytes(self) -> int:
        """Return the number of bytes that the tensor takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensor_file(
    path: Path, tensors: Sequence[Stored], metadata: dict[str, str] | None = None
) -> FileRecord:
    """Write a safetensors file, and wait until it is on the disk.

    Loads one tensor at a time into host memory.

    Args:
        path: the file.
        tensors: what to write.
        metadata: strings for the file's header.

    Raises:
        OSError: the file cannot be written.
    """
    # Wide types first, as in safetensors, so that every tensor begins at a multiple of its width.
    tensors = sorted(tensors, key=lambda stored: (-stored.dtype.itemsize, stored.name))
    file = DurableFile(path)
    try:
        file.write(_header(tensors, metadata))
        for stored in tensors:
            values = stored.load().detach().to("cpu").contiguous()
            assert (values.dtype, values.nbytes) == (stored.dtype, stored.num_bytes), stored
            if values.nbytes:
                file.write(values.view(-1).view(torch.uint8).numpy())
        return file.close()
    except BaseException:
        file.abandon()
        raise


def _header(tensors: Sequence[Stored], metadata: dict[str, str] | None) -> bytes:
    """Return the header of a file with these tensors, including its length."""
    content: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for stored in tensors:
        end = position + stored.num_bytes
        content[stored.name] = {
            "dtype": _DTYPES[stored.dtype],
            "shape": list(stored.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of eight
    return struct.pack("<Q", len(text)) + text


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class _Entry:
    """Entry of one tensor in a header."""

    dtype: Text
    shape: Shape
    data_offsets: tuple[Count, Count]


_Entries: Any = Mapping[Text, _Entry]
_Metadata: Any = Mapping[Text, Text]


@dataclass(frozen=True)
class _Place:
    """Place of a tensor in a file, as byte offsets from the file's beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorReader:
    """An open safetensors file, from which parts of tensors are read; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open the file and read its header.

        Raises:
            OSError: the file cannot be opened.
            ValueError: it is no safetensors file, or a part of it is missing.
        """
        self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise ValueError("it is no file")
            self._places, self.metadata = self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TensorReader:
        """Return the reader."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __contains__(self, name: str) -> bool:
        """Tell whether the file has a tensor of that name."""
        return name in self._places

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._places)

    def numel(self, name: str) -> int:
        """Return the number of elements of a tensor."""
        return math.prod(self._places[name].shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._places[name].shape

    def whole(self, name: str) -> torch.Tensor:
        """Return a whole tensor in new memory.

        Raises:
            OSError: the file has ended early or the disk failed.
        """
        return self.read(name, 0, self.numel(name)).view(self.shape(name))

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return elements ``start`` to ``stop`` of a flattened tensor in new memory.

        Raises:
            OSError: the file has ended early or the disk failed.
            ValueError: the tensor does not have all of these elements.
        """
        place = self._places[name]
        if not 0 <= start <= stop <= self.numel(name):
            raise ValueError(f"{name} has {self.numel(name)} elements, not {start} to {stop}")
        width = place.dtype.itemsize
        values = torch.empty(stop - start, dtype=place.dtype)
        if values.numel():
            data: Any = values.view(torch.uint8).numpy()
            self._fill(memoryview(data), place.start + start * width)
        return values

    def _fill(self, buffer: memoryview, offset: int) -> None:
        """Read bytes from an offset of the file until the buffer is full."""
        while buffer:
            count = os.preadv(self._file, [buffer], offset)
            if not count:
                raise OSError("the file ended early")
            buffer, offset = buffer[count:], offset + count

    def _read_header(self) -> tuple[dict[str, _Place], dict[str, str]]:
        """Return the places of tensors by name, and the metadata.

        Raises:
            ValueError: the header is damaged, or does not fit the size of the file.
        """
        size = os.fstat(self._file).st_size
        (length,) = struct.unpack("<Q", os.pread(self._file, 8, 0).ljust(8, b"\xff"))
        if length > min(size, _LONGEST_HEADER):
            raise ValueError("it has no header")
        content = parsed(os.pread(self._file, length, 8))
        if not isinstance(content, dict):
            raise ValueError("its header is no object")
        metadata = typed(content.pop("__metadata__", {}), _Metadata)
        places = {}
        for name, entry in typed(content, _Entries).items():
            if entry.dtype not in _BY_NAME:
                raise ValueError(f"{name}: there is no format {entry.dtype!r}")
            low, high = (8 + length + offset for offset in entry.data_offsets)
            place = _Place(_BY_NAME[entry.dtype], entry.shape, low, high)
            if math.prod(place.shape) * place.dtype.itemsize != high - low or high > size:
                raise ValueError(f"{name} does not lie whole in it")
            places[name] = place
        return places, dict(metadata)
