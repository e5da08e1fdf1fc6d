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
    """Values that a rule may read: arguments after adoption, facts, and the config so far."""

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
        """Tell whether a key is "auto" in the user's config and is not filled yet."""
        return bool(get(self.config, key) == schema.AUTO)


@dataclass(frozen=True)
class Derived:
    """A derived value.

    Attributes:
        value: the value.
        how: formula with numbers; empty if the value is that of an argument.
    """

    value: Any
    how: str = ""


@dataclass(frozen=True)
class Binding:
    """A key that means the same as one or more arguments.

    Attributes:
        key: dotted path.
        arguments: names of the arguments.
        derive: returns the key's value; None leaves the key out of the config.
        adopt: value of the key -> values of ``arguments``, in their order.
        when_present: fill the key only if the user's config has its section or says "auto".
        rule: rule in words, for the table, if the value is not just that of the argument.
        optional: leave the key out unless an argument or "auto" asks for it (``where_set``).
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
        rule: rule in words, for the table.
        reads: names of arguments that the rule reads.
        derive: returns value and formula; None leaves the key out of the config.
        only_auto: fill the key only if the user's config says "auto" or has its section.
        exact: another value in the user's config is a conflict.
        conflicts: another value in the user's config is a conflict if an argument in ``reads`` was
            changed.
    """

    key: str
    rule: str
    reads: tuple[str, ...]
    derive: Callable[[View], Derived | None]
    only_auto: bool = False
    exact: bool = False
    conflicts: bool = False


def same(name: str) -> Callable[[View], Derived | None]:
    """Return a function that derives the unchanged value of an argument."""
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
    """Return a rule for a key that is left out of the config if its argument is ``unset``.

    If the argument is ``unset`` and the config says "auto", the key gets the value that
    ``otherwise`` derives; without ``otherwise`` it gets ``unset``, or is left out if that is None.
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
    """Return the arguments as a dict of name and value."""
    return {f.name: getattr(arguments, f.name) for f in dataclasses.fields(arguments)}
