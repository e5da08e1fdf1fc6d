"""A config while it is resolved: what is set so far, why, and what is wrong with it."""

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
    """A config on its way to being complete. Each step of ``resolve`` reads it and writes into it.

    Attributes:
        label: what messages call the user's config.
        facts: what is known of world and model.
        explicit: the values that the user's config gives, by dotted path.
        changed: arguments that the user set.
        unit: the unit in which the arguments give batch sizes.
        config: the nested config so far.
        arguments: values of the arguments so far; the micro-batch is that of one rank.
        adopted: arguments whose value comes from the user's config.
        provenance: why each key has its value, by dotted path.
        reasons: why each argument has its value, where that is not its default.
        problems: what makes the config unusable.
        warnings: what the user should know but need not change.
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
        """Return the problem that a key of the user's config contradicts an argument of theirs."""
        return Problem(
            f"{key}={self.explicit[key]!r} in {self.label}, but argument {name}="
            f"{self.argument(name)!r}",
            "both were set, to different values",
            f'set {key} to "auto" to take the argument, or leave {name} at its default',
        )

    def argument(self, name: str) -> Any:
        """Return the value of an argument in the unit in which the user writes it."""
        value = self.arguments[name]
        return self.unit.as_argument(value) if name == "per_device_train_batch_size" else value


def is_placeholder(path: str, value: Any) -> bool:
    """Tell whether a value asks for being filled: "auto" where DeepSpeed does not know the word."""
    return bool(value == schema.AUTO) and not schema.auto_is_a_value(path)


def is_equal(a: Any, b: Any) -> bool:
    """Compare whatever the spelling: "5e-5" equals 5e-5, (0.9, 0.95) equals [0.9, 0.95]."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(is_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b or (isinstance(a, bool) and isinstance(b, bool) and a == b)
    try:
        return math.isclose(float(a), float(b), rel_tol=1e-9)
    except (TypeError, ValueError):
        return bool(a == b)
