"""A config while it is resolved: values so far, their reasons, problems and warnings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dstrain.config import schema
from dstrain.config.facts import Facts
from dstrain.config.resolution.batch import BatchUnit
from dstrain.config.resolution.resolved import Provenance
from dstrain.config.resolution.rules import View
from dstrain.config.resolution.tree import leaves, put
from dstrain.core.errors import Problem


@dataclass
class Draft:
    """A config that the steps of ``resolve`` complete one after the other.

    Attributes:
        label: name of the user's config in messages.
        facts: facts about ranks, machines and the model.
        explicit: values in the user's config, by dotted path.
        changed: names of the arguments that the user set.
        unit: unit of the batch sizes in the user's arguments.
        config: nested config so far.
        arguments: values of the arguments so far; the micro-batch is that of one rank.
        adopted: arguments with values from the user's config.
        provenance: reason for the value of each key, by dotted path.
        reasons: reason for the value of each argument that is not at its default.
        problems: problems that make the config unusable.
        warnings: warnings; the config can be used despite them.
    """

    label: str
    facts: Facts
    explicit: Mapping[str, Any]
    changed: frozenset[str]
    unit: BatchUnit
    config: dict[str, Any]
    arguments: dict[str, Any]
    adopted: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Provenance] = field(default_factory=dict)
    reasons: dict[str, Provenance] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def view(self) -> View:
        """Return the values that a rule may read."""
        return View(self.arguments, self.facts, self.config)

    def write(self, key: str, value: Any, why: Provenance) -> None:
        """Set a key of the config, with the reason for its value."""
        put(self.config, key, value)
        self.provenance[key] = why

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """Yield dotted path and value of every key so far."""
        yield from leaves(self.config)

    def conflict(self, key: str, name: str) -> Problem:
        """Return the problem of a key in the user's config that contradicts the user's argument."""
        return Problem(
            f"{key}={self.explicit[key]!r} in {self.label}, but argument {name}="
            f"{self.argument(name)!r}",
            "both were set, to different values",
            f'set {key} to "auto" to take the argument, or leave {name} at its default',
        )

    def argument(self, name: str) -> Any:
        """Return the value of an argument in the unit of the user's arguments."""
        value = self.arguments[name]
        return self.unit.as_argument(value) if name == "per_device_train_batch_size" else value


def is_placeholder(path: str, value: Any) -> bool:
    """Tell whether a value is "auto" at a key where that has no meaning for DeepSpeed."""
    return bool(value == schema.AUTO) and not schema.auto_is_a_value(path)


def is_equal(a: Any, b: Any) -> bool:
    """Tell whether values are equal in any spelling: "5e-5" and 5e-5, (0.9, 0.95) and a list."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(is_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b or (isinstance(a, bool) and isinstance(b, bool) and a == b)
    try:
        return math.isclose(float(a), float(b), rel_tol=1e-9)
    except (TypeError, ValueError):
        return bool(a == b)
