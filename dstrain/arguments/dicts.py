"""Conversion of arguments that are a dict, from the text of a JSON object."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

from dstrain.core.errors import Problem

# Dicts of texts; a text in them that looks like a number stays a text.
_OF_TEXTS = ("prompts", "router_mapping")


def read_dicts(
    arguments: Any, names: tuple[str, ...], *, texts: tuple[str, ...] = ()
) -> dict[str, Problem]:
    """Parse the named fields, in place, if they are text; convert texts of numbers in them.

    Numbers are texts in YAML if a dot is missing: ``1e-6``.

    Args:
        arguments: a dataclass instance.
        names: fields with a dict; "none" becomes None.
        texts: fields among ``names`` that may also be a text without a JSON object.

    Returns:
        field -> problem, for each field with a text that is no JSON object.
    """
    problems = {}
    for name in names:
        value = getattr(arguments, name)
        if isinstance(value, str) and (name not in texts or value.lstrip().startswith("{")):
            with contextlib.suppress(ValueError):
                value = None if value.strip().lower() == "none" else json.loads(value)
            if value is not None and not isinstance(value, dict):
                problems[name] = Problem(
                    f"{name}={getattr(arguments, name)!r}", "expected a JSON object, or none"
                )
                continue
        setattr(arguments, name, value if name in _OF_TEXTS else plain_values(value))
    return problems


def plain_values(value: Any) -> Any:
    """Return a parsed dict in which texts of bools and numbers ("true", "1.5") are converted."""
    if isinstance(value, dict):
        return {k: plain_values(v) for k, v in value.items()}
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return int(value)
    except ValueError:
        pass
    try:
        number = float(value)
    except ValueError:
        return value
    return number if math.isfinite(number) else value
