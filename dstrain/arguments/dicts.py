"""Arguments that are a dict, or a JSON object as text, as a shell writes it."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

from dstrain.core.errors import Problem

# Their values are texts that may look like numbers.
_OF_TEXTS = ("prompts", "router_mapping")


def read_dicts(
    arguments: Any, names: tuple[str, ...], *, texts: tuple[str, ...] = ()
) -> dict[str, Problem]:
    """Parse the named fields in place where they are text, and numbers in them that are text.

    YAML reads ``1e-6`` as text, since a dot is missing.

    Args:
        arguments: a dataclass instance.
        names: fields that hold a dict; "none" is None.
        texts: those of them for which other text is a value of its own.

    Returns:
        the problem of each field with a text that is no JSON object.
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
    """Return a parsed dict with texts that mean a bool or a number as that: "true", "1", "1.5"."""
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
