"""Conversion of metrics to plain values that JSON, and so the state of a run, can hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from dstrain.core.errors import DataError, Problem, raise_problems


def plain_numbers(value: Any) -> Any:
    """Convert numpy numbers and one-element tensors and arrays, also nested, to Python numbers."""
    if isinstance(value, Mapping):
        return {k: plain_numbers(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [plain_numbers(v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "item") and math.prod(shape) == 1:
        return value.item()
    return value


def recordable(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Convert metrics to values that JSON can hold: numbers, text, lists and dicts of these.

    Raises:
        DataError: some cannot be converted; the message names each of them.
    """
    plain = {name: plain_numbers(value) for name, value in figures.items()}
    problems = [
        Problem(
            f"the metric {name!r} is {described(found)}",
            "metrics and logs are kept in the state of the run, which is JSON",
            "give one number for each name: float(values.mean()), or a name for each of the values",
        )
        for name, value in plain.items()
        for _, found in list(unrecordable(value))[:1]
    ]
    raise_problems(problems, error=DataError)
    return plain


def unrecordable(value: Any, place: str = "", *, finite: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield the place and value of each part of a nested value that JSON cannot hold.

    Args:
        value: any value.
        place: place of ``value`` itself in a larger one, such as "metrics[0]"; "" for none.
        finite: yield NaN and infinities too, which most readers of JSON refuse.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        if finite and isinstance(value, float) and not math.isfinite(value):
            yield place, value
        return
    if isinstance(value, Mapping):
        for name, part in value.items():
            inside = f"{place}.{name}" if place else str(name)
            yield from unrecordable(part, inside, finite=finite)
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from unrecordable(part, f"{place}[{index}]", finite=finite)
    else:
        yield place, value


def described(value: Any) -> str:
    """Describe a value for a message: a float as it is, any other by its type and shape."""
    if isinstance(value, float):
        return str(value)
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    shape = getattr(value, "shape", None)
    return f"a {name}" if shape is None else f"a {name} of shape {tuple(shape)}"
