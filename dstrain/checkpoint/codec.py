"""Lossless conversion of Python values to JSON and back, for state of schedules and callbacks.

JSON alone would turn tuples into lists and integer keys into strings, and has no NaN. Values that
JSON lacks are written as an object with one key in double underscores. Reading never executes code.
"""

from __future__ import annotations

import base64
import collections
import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict, with_config

from dstrain.core.documents import MOST_LEVELS, Number, Shape, Text, typed
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
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# Levels of a document around an encoded value; with these, no value exceeds ``MOST_LEVELS``.
_LEVELS_AROUND = 20


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class _TensorForm:
    """JSON form of a tensor: its dtype, its shape, and its elements as base64."""

    dtype: Text
    shape: Shape
    data: Text


def encode(value: Any, *, where: str, levels: int = 0) -> Any:
    """Return the JSON form of a value made of plain Python types, tensors and numpy numbers.

    Args:
        value: the value to encode.
        where: its name, for the message.
        levels: levels of JSON around the value.

    Raises:
        CheckpointError: a value of another type, or nested too deep; the message names its place.
    """
    if levels > MOST_LEVELS - _LEVELS_AROUND:
        raise CheckpointError(
            Problem(f"{where[:200]}... is nested too deep", "readers of JSON refuse such values")
        )
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [encode(v, where=f"{where}[{i}]", levels=levels + 2) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"__tuple__": items}
    if isinstance(value, dict):
        return _encode_dict(value, where, levels + 1)
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode()}
    found = type(value).__name__
    if isinstance(value, np.ndarray):
        found = f"numpy array of {value.dtype}"
        if value.dtype.name in _DTYPES:
            value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        found = f"tensor of {value.dtype}, {value.layout}"
        if value.dtype in _DTYPES.values() and value.layout == torch.strided:
            return _encode_tensor(value)
    raise CheckpointError(
        Problem(
            f"{where} is a {found}",
            "checkpoints hold plain values and tensors only; pickles are never written or read",
            "give it a state_dict of plain values",
        )
    )


def is_plain(value: Any) -> bool:
    """Tell whether ``encode`` can write a value."""
    try:
        encode(value, where="")
    except CheckpointError:
        return False
    return True


def decode(value: Any, where: str = "") -> Any:
    """Decode a JSON form that ``encode`` made, and return the value.

    Args:
        value: parsed JSON of limited depth (``documents.parsed``).
        where: its place, for the message.

    Raises:
        ValueError: ``encode`` does not write such a form; the message names its place.
    """
    if isinstance(value, list):
        return [decode(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((kind, content),) = value.items()
        if kind in _FORMS:
            try:
                return _FORMS[kind](content, where)
            except (TypeError, ValueError, KeyError) as error:
                if isinstance(error, _FormError):
                    raise
                why = f"no {kind}: {error}" if str(error) else f"no {kind}"
                raise _FormError(f"{where or 'the value'} is {why}") from error
    return {k: decode(v, f"{where}.{k}" if where else k) for k, v in value.items()}


class _FormError(ValueError):
    """Error of a JSON form that ``encode`` does not write; its message names the place."""


def _decode_float(content: Any, where: str) -> float:
    return _FLOATS[typed(content, str)]


def _decode_tuple(content: Any, where: str) -> tuple[Any, ...]:
    return tuple(decode(v, f"{where}[{i}]") for i, v in enumerate(_list(content)))


def _decode_bytes(content: Any, where: str) -> bytes:
    return base64.b64decode(typed(content, str), validate=True)


def _decode_pairs(content: Any, where: str) -> dict[Any, Any]:
    pairs = {}
    for key, value in (_pair(pair) for pair in _list(content)):
        found = _hashable(decode(key, where))
        pairs[found] = decode(value, f"{where}[{found!r}]"[:_LONGEST_PLACE])
    return pairs


def _decode_counter(content: Any, where: str) -> collections.Counter[Any]:
    pairs = _decode_pairs(content, where)
    return collections.Counter({key: typed(value, _NUMBER) for key, value in pairs.items()})


def _list(content: Any) -> list[Any]:
    if not isinstance(content, list):
        raise ValueError("it has no list in it")
    return content


def _pair(content: Any) -> tuple[Any, Any]:
    if not isinstance(content, list) or len(content) != 2:
        raise ValueError("it has something else in it than pairs")
    return content[0], content[1]


def _encode_dict(value: dict[Any, Any], where: str, levels: int) -> Any:
    if isinstance(value, collections.Counter):
        pairs = [
            [encode(k, where=where, levels=levels + 2), encode(v, where=where)]
            for k, v in value.items()
        ]
        return {"__counter__": pairs}
    if all(isinstance(k, str) and not k.startswith("__") for k in value):
        return {k: encode(v, where=f"{where}.{k}", levels=levels) for k, v in value.items()}
    return {
        "__dict__": [
            [
                encode(k, where=where, levels=levels + 2),
                encode(v, where=f"{where}[{k!r}]", levels=levels + 2),
            ]
            for k, v in value.items()
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


def _decode_tensor(content: Any, where: str) -> torch.Tensor:
    form = typed(content, _TensorForm)
    if form.dtype not in _DTYPES:
        raise ValueError(f"there is no format {form.dtype[:_LONGEST_PLACE]!r}")
    dtype, data = _DTYPES[form.dtype], bytearray(base64.b64decode(form.data, validate=True))
    if len(data) != math.prod(form.shape) * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes do not make a tensor of shape {form.shape}")
    if not data:
        return torch.empty(form.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(form.shape)


def _hashable(key: Any) -> Hashable:
    key = tuple(key) if isinstance(key, list) else key
    hash(key)  # TypeError where it cannot be a key
    return key


_LONGEST_PLACE = 200
_NUMBER: Any = Number
_FORMS = {
    "__float__": _decode_float,
    "__tuple__": _decode_tuple,
    "__bytes__": _decode_bytes,
    "__tensor__": _decode_tensor,
    "__dict__": _decode_pairs,
    "__counter__": _decode_counter,
}
