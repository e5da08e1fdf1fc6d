"""Values of a DeepSpeed config: conversion to the types of a key, checks, and messages."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Final

from dstrain.config.schema.entry import NO_DEFAULT, NONE, Key
from dstrain.core.errors import nearest

MISFIT: Final = object()
YES: Final = ("true", "yes", "on", "1")
NO: Final = ("false", "no", "off", "0")


def fit(value: Any, key: Key) -> Any:
    """Return the value converted to a type of the key, or ``MISFIT``; a bool is no number."""
    kinds = key.types
    if value is None or isinstance(value, bool):
        return value if type(value) in kinds else MISFIT
    if isinstance(value, str) and str not in kinds:
        number = _number(value) if int in kinds or float in kinds else None
        if number is None:
            return MISFIT
        value = float(number) if int not in kinds else number
    if isinstance(value, int):
        return value if int in kinds or float in kinds else MISFIT
    if isinstance(value, float):
        if not math.isfinite(value):
            return value if key.infinite and value == math.inf else MISFIT
        if float in kinds:
            return value
        return int(value) if int in kinds and value.is_integer() else MISFIT
    if isinstance(value, (list, tuple)):
        return value if list in kinds else MISFIT
    if isinstance(value, Mapping):
        return MISFIT
    if object in kinds and not isinstance(value, str):
        return value
    plain = tuple(kind for kind in kinds if kind in (str, os.PathLike))
    return value if isinstance(value, plain) else MISFIT


def _number(text: str) -> int | float | None:
    """Return the number in a string ("5e-5", "1e9", "16"), or None."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return None


def is_allowed(value: Any, key: Key) -> bool:
    """Tell whether a value of the right type is one of the choices and within the range."""
    if value is None:
        return True
    if key.choices or key.any_case:
        folded = str(value).lower() in {choice.lower() for choice in key.any_case}
        return value in key.choices or folded
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return True
    return not (
        (key.minimum is not None and value < key.minimum)
        or (key.maximum is not None and value > key.maximum)
        or (key.above is not None and value <= key.above)
        or (key.below is not None and value >= key.below)
    )


def remedy_for(value: Any, key: Key) -> str:
    """Return a remedy for a wrong value of a key."""
    word = str(value).strip().lower()
    if bool in key.types and word in (*YES, *NO):
        return f"write {'true' if word in YES else 'false'}, without quotes"
    choices = {str(choice).lower(): choice for choice in (*key.any_case, *key.choices)}
    near = nearest(word, set(choices))
    if near:
        return f"did you mean {choices[near]!r}?"
    if key.default is NO_DEFAULT:
        return ""
    known = "" if key.default is None else f" for DeepSpeed's default, {show(key.default)}"
    return f"leave it out{known}"


def expected(key: Key) -> str:
    """Return the accepted values of a key in words."""
    options = [repr(choice) for choice in (*key.any_case, *key.choices)]
    if not options:
        names: dict[type, str] = {
            bool: "true or false", int: "an integer", float: "a number", str: "a string",
            list: "a list", object: "a Python object that JSON cannot hold",
        }  # fmt: skip
        options = [names[kind] for kind in key.types if kind in names]
    limits = {">=": key.minimum, ">": key.above, "<=": key.maximum, "<": key.below}
    given = [f"{sign} {limit:g}" for sign, limit in limits.items() if limit is not None]
    if given:
        options[0] += f" {' and '.join(given)}"
    options += ["'auto'"] if key.auto_is_value else []
    options += ["null"] if NONE in key.types else []
    return ("one of " if key.choices or key.any_case else "") + either(options)


def either(options: list[str]) -> str:
    """Return options as a text: "a, b or c"."""
    return " or ".join([", ".join(options[:-1]), options[-1]] if options[1:] else options)


def kind_of(value: Any) -> str:
    """Return the type of a value in words, as JSON calls it."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return "not a finite number"
        return "a number" if value.is_integer() else "a number with a fraction"
    kinds: dict[Any, str] = {
        bool: "a boolean", int: "an integer", str: "a string", NONE: "null",
        Mapping: "an object", (list, tuple): "a list",
    }  # fmt: skip
    for kind, text in kinds.items():
        if isinstance(value, kind):
            return text
    return f"a Python {type(value).__name__}"


def show(value: Any) -> str:
    """Return a value as text of at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
