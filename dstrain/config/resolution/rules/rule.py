"""Forms of a rule, and the values that a rule may read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.config import schema
from dstrain.config.facts import Facts
from dstrain.config.resolution.tree import get


@dataclass(frozen=True)
class View:
    """Values that a rule may read: adopted arguments, facts, and the config filled so far."""

    arguments: Mapping[str, Any]
    facts: Facts
    config: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        """Return an argument by name."""
        try:
            return self.arguments[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def stage(self) -> int:
        """Return the ZeRO stage after resolution."""
        return int(self.config.get("zero_optimization", {}).get("stage", 0))

    @property
    def precision(self) -> str:
        """Return the format of weights and activations: "bf16", "fp16" or "fp32"."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @property
    def offloads_optimizer(self) -> bool:
        """Tell whether the optimizer runs on the host."""
        return self.device_of("offload_optimizer") != "none"

    def device_of(self, name: str) -> str:
        """Return the device of ``offload_optimizer`` or ``offload_param``: none, cpu or nvme."""
        return str(getattr(self, name))  # "auto" is decided before the rules run

    def asks(self, key: str) -> bool:
        """Tell whether the user's config says "auto" at a key that is not filled yet."""
        return bool(get(self.config, key) == schema.AUTO)


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
        rule: where the value comes from when it is not simply the argument's, for the table.
        optional: the key stays out of the config while nobody asks for it (``where_set``).
    """

    key: str
    arguments: tuple[str, ...]
    derive: Callable[[View], Derived | None]
    adopt: Callable[[Any], tuple[Any, ...]] = lambda value: (value,)
    when_present: bool = False
    rule: str = ""
    optional: bool = False


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
        conflicts: a different value of the user's is a conflict where an argument that the rule
            reads was changed.
    """

    key: str
    rule: str
    reads: tuple[str, ...]
    derive: Callable[[View], Derived | None]
    only_auto: bool = False
    exact: bool = False
    conflicts: bool = False


def same(name: str) -> Callable[[View], Derived | None]:
    """Return a rule that takes the value of one argument as it stands."""
    return lambda view: Derived(getattr(view, name))


def where_set(
    key: str,
    name: str,
    *,
    unset: Any = None,
    otherwise: Callable[[View], Derived | None] | None = None,
    adopt: Callable[[Any], tuple[Any, ...]] = lambda value: (value,),
    rule: str = "",
) -> Binding:
    """Return a rule for a key that stays out of the config while its argument is ``unset``.

    Where the config says "auto", the key gets what ``otherwise`` derives. Without ``otherwise`` it
    gets ``unset``, and is left out where that is None.
    """

    def derive(view: View) -> Derived | None:
        value = getattr(view, name)
        if value != unset:
            return Derived(value)
        if not view.asks(key):
            return None
        if otherwise is not None:
            return otherwise(view)
        return None if unset is None else Derived(unset)

    return Binding(key, (name,), derive, adopt, rule=rule, optional=True)


def readable_arguments(arguments: Any) -> dict[str, Any]:
    """Return the arguments as a plain mapping, shallow."""
    return {f.name: getattr(arguments, f.name) for f in dataclasses.fields(arguments)}
