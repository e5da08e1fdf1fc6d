"""Arguments for callbacks and trackers: copies with the values of the run."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

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
    """Return the arguments with the values of the run, in the units of the user's arguments.

    They are a copy; if no value differs, the user's object itself.
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


@dataclass
class _Copy:
    """A copy of the arguments with the values of the run, and the values when it was made.

    Attributes:
        arguments: the user's object.
        resolved: config of the run.
        shown: the copy; the user's object itself if no value differs.
        taken_from: attributes of ``arguments`` when the copy was made.
        given: attributes of ``shown`` before the user's next assignment to it.
    """

    arguments: TrainingArguments
    resolved: ResolvedConfig
    shown: TrainingArguments
    taken_from: Mapping[str, Any]
    given: Mapping[str, Any]

    @staticmethod
    def of(arguments: TrainingArguments, resolved: ResolvedConfig) -> _Copy:
        """Copy the arguments, with the values of the run."""
        shown = running_arguments(arguments, resolved)
        return _Copy(arguments, resolved, shown, dict(vars(arguments)), dict(vars(shown)))

    def is_of(self, arguments: TrainingArguments, resolved: ResolvedConfig) -> bool:
        """Tell whether a new copy of these arguments would equal this one."""
        return (
            self.arguments is arguments
            and self.resolved is resolved
            and _are_same(vars(arguments), self.taken_from)
        )

    def hand_over(self) -> bool:
        """Repeat assignments to the copy on the user's object; tell whether there were any."""
        present = vars(self.shown)
        if self.shown is self.arguments or _are_same(present, self.given):
            return False
        before, self.given = self.given, dict(present)
        for name, value in self.given.items():
            if name not in before or value is not before[name]:
                setattr(self.arguments, name, value)
        return True


class ShownArguments:
    """Arguments with the values of the run, for code of the user.

    They are copied once, and again only after the config or the user's object has changed:
    callbacks get them several times in every optimizer step.
    """

    def __init__(self) -> None:
        """Begin without a copy."""
        self._copy: _Copy | None = None

    @contextlib.contextmanager
    def of(self, arguments: T, resolved: ResolvedConfig) -> Iterator[T]:
        """Return the copy for a block; when the block ends, repeat its assignments.

        Values that code in the block assigns to the copy are assigned to the user's object.
        """
        shown = self._copy
        if shown is None or not shown.is_of(arguments, resolved):
            shown = self._copy = _Copy.of(arguments, resolved)
        try:
            yield cast("T", shown.shown)
        finally:
            if shown.hand_over():
                self._copy = None


def _are_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether two mappings have the same objects under the same names, in the same order."""
    return (
        len(one) == len(other)
        and all(map(operator.is_, one.values(), other.values()))
        and list(one) == list(other)
    )


def _running(name: str, resolved: ResolvedConfig) -> Any:
    value = resolved.arguments[name]
    if name == "per_device_train_batch_size":
        return resolved.batch_unit.as_argument(value)
    return value


def _schedule(resolved: ResolvedConfig) -> dict[str, Any]:
    """Return values of arguments for the schedule of the config; {} if it has none."""
    if not resolved.has_scheduler:
        return {}
    kind, warmup = resolved.schedule_type, "scheduler.params.warmup_num_steps"
    found: dict[str, Any] = {"lr_scheduler_type": SCHEDULES.get(kind.lower(), kind)}
    if warmup in resolved.values and resolved.provenance[warmup].source == "config":
        found |= {"warmup_steps": resolved.values[warmup], "warmup_ratio": 0.0}
    return found
