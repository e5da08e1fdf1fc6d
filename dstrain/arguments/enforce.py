"""Application of the treatments of arguments: moving old names, warnings, refusals."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Hashable
from types import FrameType
from typing import Any, cast

from dstrain.arguments.fields import default_of, shown, treatment_of
from dstrain.arguments.treatment import NOT_YET, Treatment
from dstrain.core.errors import Problem
from dstrain.core.ranks import launched_ranks
from dstrain.core.secrets import hidden_in_text


def declared(cls: type[Any]) -> dict[str, tuple[Treatment, Any]]:
    """Return treatment and documented default of each argument of a dataclass, by name.

    A subclass that declares a field again with another default, and without a treatment, changes
    neither: a refused argument stays refused.
    """
    return _declared(cast("Hashable", cls))


@functools.cache
def _declared(cls: Any) -> dict[str, tuple[Treatment, Any]]:
    found: dict[str, tuple[Treatment, Any]] = {}
    for base in reversed(cls.__mro__):
        for name, field in vars(base).get("__dataclass_fields__", {}).items():
            treatment = treatment_of(field)
            if treatment is not None:
                found[name] = (treatment, default_of(field))
    return found


def move_old_names(arguments: Any) -> tuple[list[str], list[Problem]]:
    """Move values from deprecated names to new names; return the new names, and conflicts."""
    moved, problems = [], []
    table = declared(type(arguments))
    for name, (treatment, default) in table.items():
        old = getattr(arguments, name)
        if treatment.kind != "alias" or old is None or old == default:
            continue
        (new,) = treatment.targets
        present, new_default = getattr(arguments, new), table[new][1]
        try:
            value = old if treatment.convert is None else treatment.convert(arguments, old)
            if treatment.convert is None and present not in (new_default, value):
                raise ValueError
        except ValueError:
            problems.append(
                Problem(
                    f"{name}={shown(name, old)} and {new}={shown(new, present)}",
                    f"{name} is the old name of {new}, and the two contradict each other",
                    f"keep {new} alone",
                )
            )
            continue
        setattr(arguments, new, value)
        setattr(arguments, name, default)
        moved.append(new)
        warn(f"{name} is deprecated: {new}={shown(new, value)} is what it means now", FutureWarning)
    return moved, problems


def refusals(arguments: Any) -> list[Problem]:
    """Return a problem for each value that is refused or not implemented.

    For each value without effect a warning is given.
    """
    problems = []
    for name, (treatment, default) in declared(type(arguments)).items():
        value = getattr(arguments, name)
        if treatment.refuses(value, default):
            why = treatment.note
            if treatment.kind == "pending":
                why = f"{NOT_YET}: {why}"
            remedy = treatment.remedy or f"leave it out (its default is {default!r})"
            problems.append(Problem(f"{name}={shown(name, value)}", why, remedy))
        elif treatment.kind == "no effect" and value is not None and value != default:
            warn(f"{name}={shown(name, value)} has no effect: {treatment.note}", UserWarning)
    return problems


def warn(message: str, category: type[Warning]) -> None:
    """Warn on the first rank of a machine, at the line outside of dstrain that set them."""
    if not launched_ranks().is_local_main:
        return
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(hidden_in_text(message), category, stacklevel=level)


def _is_ours(frame: FrameType) -> bool:
    """Tell whether a frame runs code of dstrain, or an ``__init__`` that ``@dataclass`` wrote."""
    module = frame.f_globals.get("__name__", "")
    return module.split(".")[0] == "dstrain" or frame.f_code.co_filename == "<string>"
