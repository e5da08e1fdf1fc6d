"""The arguments as callbacks and trackers see them: with the values that run."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, Final, TypeVar

from dstrain.arguments import TrainingArguments
from dstrain.arguments.choice import Choice
from dstrain.config.resolution.resolved import ResolvedConfig
from dstrain.config.resolution.rules import RULES, SCHEDULES, Binding

T = TypeVar("T", bound=TrainingArguments)
# Arguments whose value the user's config, or the resolution, may decide.
BOUND_ARGUMENTS: Final = frozenset(
    name for rule in RULES if isinstance(rule, Binding) for name in rule.arguments
)


def running_arguments(arguments: T, resolved: ResolvedConfig) -> T:
    """Return the arguments with the values that run, in the user's own units.

    The user's object is left as it is, and returned where nothing differs; else a copy.
    """
    values = {name: _running(name, resolved) for name in BOUND_ARGUMENTS} | _schedule(resolved)
    differing = {n: v for n, v in values.items() if v != getattr(arguments, n)}
    if not differing:
        return arguments
    shown = copy.copy(arguments)
    for name, value in differing.items():
        is_choice = isinstance(getattr(arguments, name), Choice)
        setattr(shown, name, Choice(value) if is_choice else value)
    return shown


@contextlib.contextmanager
def shown_arguments(arguments: T, resolved: ResolvedConfig) -> Iterator[T]:
    """Give code of the user's the arguments with the values that run.

    What that code assigns to them is assigned to the user's own object when the block ends.
    """
    shown = running_arguments(arguments, resolved)
    if shown is arguments:
        yield arguments
        return
    before = dict(vars(shown))
    try:
        yield shown
    finally:
        for name, value in vars(shown).items():
            if name not in before or value is not before[name]:
                setattr(arguments, name, value)


def _running(name: str, resolved: ResolvedConfig) -> Any:
    value = resolved.arguments[name]
    if name == "per_device_train_batch_size":
        return resolved.batch_unit.as_argument(value)
    return value


def _schedule(resolved: ResolvedConfig) -> dict[str, Any]:
    """Return the arguments about the schedule where one of the user's config runs."""
    if not resolved.has_scheduler:
        return {}
    kind, warmup = resolved.schedule_type, "scheduler.params.warmup_num_steps"
    found: dict[str, Any] = {"lr_scheduler_type": SCHEDULES.get(kind.lower(), kind)}
    if warmup in resolved.values and resolved.provenance[warmup].source == "config":
        found |= {"warmup_steps": resolved.values[warmup], "warmup_ratio": 0.0}
    return found
