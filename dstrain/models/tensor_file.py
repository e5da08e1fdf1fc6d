"""Writing safetensors files tensor by tensor, so that a file never stands whole in memory.

``safetensors.torch.save_file`` turns all tensors into bytes before it writes the first. The format:
eight bytes with the length of the header, the header in JSON, the tensors one after another
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dstrain.core.files import DurableFile, FileRecord

_DTYPES = {
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file.

    Attributes:
        name: its key.
        shape: as stored.
        dtype: as stored.
        load: gives the values, of any shape with as many elements, on any device.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor] = field(repr=False)

    @staticmethod
    def of(name: str, tensor: torch.Tensor) -> Stored:
        """A tensor that exists already."""
        return Stored(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensor_file(
    path: Path, tensors: Sequence[Stored], metadata: dict[str, str] | None = None
) -> FileRecord:
    """Write a safetensors file and wait until it is on the disk.

    Host memory holds no more than one tensor that was not there before.

    Raises:
        OSError: the disk is full, the folder is gone, and so on.
    """
    # Wide types first, as safetensors does it: every tensor then begins at a multiple of its width.
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
