"""Python values as JSON and back, exactly: the state of schedules, random generators, callbacks.

JSON alone would turn tuples into lists and integer keys into strings, and has no NaN. What it lacks
is written as an object with one key in double underscores. Nothing is ever executed to read it.
"""

from __future__ import annotations

import base64
import collections
import math
from typing import Any

import numpy as np
import torch

from dstrain.core.errors import CheckpointError, Problem

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


def encode(value: Any, *, where: str) -> Any:
    """The JSON form of a value made of plain Python types, tensors and numpy numbers.

    Args:
        value: what to write.
        where: its name, for the message.

    Raises:
        CheckpointError: a value of another type, with its place.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [encode(v, where=f"{where}[{i}]") for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"__tuple__": items}
    if isinstance(value, dict):
        return _encode_dict(value, where)
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value)
    raise CheckpointError(
        Problem(
            f"{where} is a {type(value).__name__}",
            "checkpoints hold plain values and tensors only; pickles are never written or read",
            "give it a state_dict of plain values",
        )
    )


def is_plain(value: Any) -> bool:
    """Whether ``encode`` can write a value."""
    try:
        encode(value, where="")
    except CheckpointError:
        return False
    return True


def decode(value: Any) -> Any:
    """The value that ``encode`` was given."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((kind, content),) = value.items()
        if kind == "__float__":
            return float(content)
        if kind == "__tuple__":
            return tuple(decode(v) for v in content)
        if kind == "__bytes__":
            return base64.b64decode(content)
        if kind == "__tensor__":
            return _decode_tensor(content)
        if kind == "__dict__":
            return {_hashable(decode(k)): decode(v) for k, v in content}
        if kind == "__counter__":
            return collections.Counter({_hashable(decode(k)): v for k, v in content})
    return {k: decode(v) for k, v in value.items()}


def _encode_dict(value: dict[Any, Any], where: str) -> Any:
    if isinstance(value, collections.Counter):
        return {"__counter__": [[encode(k, where=where), v] for k, v in value.items()]}
    if all(isinstance(k, str) and not k.startswith("__") for k in value):
        return {k: encode(v, where=f"{where}.{k}") for k, v in value.items()}
    return {
        "__dict__": [
            [encode(k, where=where), encode(v, where=f"{where}[{k!r}]")] for k, v in value.items()
        ]
    }


def _encode_tensor(value: torch.Tensor) -> Any:
    values = value.detach().to("cpu").contiguous()
    data = values.view(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b""
    return {
        "__tensor__": {
            "dtype": str(values.dtype).removeprefix("torch."),
            "shape": list(values.shape),
            "data": base64.b64encode(data).decode(),
        }
    }


def _decode_tensor(content: dict[str, Any]) -> torch.Tensor:
    dtype, shape = _DTYPES[content["dtype"]], content["shape"]
    data = bytearray(base64.b64decode(content["data"]))
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(shape)


def _hashable(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key
