"""Arguments that are a dict, or a JSON object as text, as a shell writes it."""

from __future__ import annotations

import json
import math
from typing import Any

from dstrain.core.errors import Problem


def read_dicts(arguments: Any, names: tuple[str, ...], *, texts: tuple[str, ...] = ()) -> Any:
    """Parse the named fields in place where they are still text.

    Args:
        arguments: a dataclass instance.
        names: fields that hold a dict; "none" is None.
        texts: those of them for which other text is a value of its own.

    Returns:
        a problem for each text that is no JSON object.
    """
    problems = []
    for name in names:
        given = getattr(arguments, name)
        if not isinstance(given, str):
            continue
        if name in texts and not given.lstrip().startswith("{"):
            continue
        try:
            parsed = None if given.strip().lower() == "none" else json.loads(given)
        except ValueError:
            parsed = given
        if parsed is not None and not isinstance(parsed, dict):
            problems.append(Problem(f"{name}={given!r}", "expected a JSON object, or none"))
            continue
        setattr(arguments, name, plain_values(parsed))
    return problems


def plain_values(value: Any) -> Any:
    """Text in a parsed dict that means a bool or a number, as that: "true", "1", "1.5"."""
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
