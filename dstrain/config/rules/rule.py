"""What a rule is, and what it may read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.config.facts import Facts


@dataclass(frozen=True)
class View:
    """What a rule may read: arguments after adoption, facts, and the config as filled so far."""

    arguments: Mapping[str, Any]
    facts: Facts
    config: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        """An argument by name."""
        try:
            return self.arguments[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def stage(self) -> int:
        """ZeRO stage after resolution."""
        return int(self.config.get("zero_optimization", {}).get("stage", 0))

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer runs on the host."""
        return self.offload_optimizer != "none"


@dataclass(frozen=True)
class Derived:
    """A value and how it came about.

    ``how`` is the formula with its numbers; empty when the value is an argument's own.
    """

    value: Any
    how: str = ""


@dataclass(frozen=True)
class Binding:
    """A key that means the same as one or more arguments.

    Attributes:
        key: dotted path.
        arguments: names of the arguments.
        adopt: argument values that a config value stands for, in the order of ``arguments``.
        derive: the key's value from arguments; None leaves the key out of the config.
        when_present: fill it only where the user's config has the section or says "auto".
    """

    key: str
    arguments: tuple[str, ...]
    derive: Callable[[View], Derived | None]
    adopt: Callable[[Any], tuple[Any, ...]] = lambda value: (value,)
    when_present: bool = False


@dataclass(frozen=True)
class Derivation:
    """A key computed from arguments and facts.

    Attributes:
        key: dotted path.
        rule: the rule in words, for the generated table.
        reads: argument names the rule reads.
        derive: value and formula, or None to leave the key out.
        only_auto: fill it only where the user's config says "auto" or has its section.
        exact: a different value of the user's is a conflict, not a choice.
        conflicts: it is one where an argument that the rule reads was changed.
    """

    key: str
    rule: str
    reads: tuple[str, ...]
    derive: Callable[[View], Derived | None]
    only_auto: bool = False
    exact: bool = False
    conflicts: bool = False


def same(name: str) -> Callable[[View], Derived | None]:
    """The value of one argument as it stands."""
    return lambda view: Derived(getattr(view, name))


def readable_arguments(arguments: Any) -> dict[str, Any]:
    """The arguments as a plain mapping, shallow."""
    return {f.name: getattr(arguments, f.name) for f in dataclasses.fields(arguments)}
