"""Adoption: arguments at their default take the values of the user's config."""

from __future__ import annotations

from typing import Any

from dstrain.config import optimizers
from dstrain.config.resolution.batch import accumulation_for
from dstrain.config.resolution.draft import Draft, is_equal
from dstrain.config.resolution.resolved import Provenance
from dstrain.config.resolution.rules import RULES, Binding
from dstrain.core.errors import Problem


def adopt(draft: Draft) -> None:
    """Set arguments to the values of the user's config; add conflicts to the problems."""
    settled: dict[str, Any] = {}
    for rule in RULES:
        if not isinstance(rule, Binding) or rule.key not in draft.explicit:
            continue
        for name, value in _values(rule, draft):
            _adopt_one(rule.key, name, value, settled, draft)
    draft.arguments |= draft.adopted
    _adopt_accumulation(draft)


def _values(rule: Binding, draft: Draft) -> list[tuple[str, Any]]:
    """Return arguments, with values, that a key of the user's config sets; [] for a wrong value."""
    given = draft.explicit[rule.key]
    try:
        values = rule.adopt(given)
    except TypeError:
        values = ()
    if len(values) == len(rule.arguments):
        return list(zip(rule.arguments, values, strict=True))
    draft.problems.append(
        Problem(
            f"{rule.key}={given!r}",
            f"it stands for {' and '.join(rule.arguments)}: one value for each",
        )
    )
    return []


def _adopt_one(key: str, name: str, value: Any, settled: dict[str, Any], draft: Draft) -> None:
    """Set one argument to the value of a key of the user's config, or add a conflict.

    Args:
        key: key of the config.
        name: name of the argument.
        value: value of the argument with the meaning of the key; None if it has none.
        settled: argument -> value, from keys that were read before.
        draft: the config.
    """
    given = draft.explicit[key]
    if name in draft.changed:
        is_variant = name == "optim" and optimizers.stands_for(given, draft.arguments[name])
        is_same = value is not None and is_equal(value, draft.arguments[name])
        if not is_same and not (is_variant and value is not None):
            draft.problems.append(draft.conflict(key, name))
    elif value is None:
        return
    elif name in settled and not is_equal(value, settled[name]):
        draft.problems.append(
            Problem(
                f"{key}={given!r} in {draft.label}",
                f"another key of it sets {name} to {settled[name]!r}",
                "make the two equal",
            )
        )
    else:
        settled[name] = value
        draft.reasons[name] = Provenance("config", f"{key} in {draft.label}")
        if not is_equal(value, draft.arguments[name]):
            draft.adopted[name] = value


def _adopt_accumulation(draft: Draft) -> None:
    """Derive accumulation from the user's ``train_batch_size`` if the user set no other value."""
    name, total = "gradient_accumulation_steps", draft.explicit.get("train_batch_size")
    if total is None or name in draft.explicit or name in draft.changed:
        return
    micro, world = draft.arguments["per_device_train_batch_size"], draft.facts.world_size
    if (count := accumulation_for(total, micro, world)) is not None:
        draft.adopted[name] = draft.arguments[name] = count
        draft.reasons[name] = Provenance(
            "derived", f"train_batch_size {total} / (micro-batch {micro} x ranks {world})"
        )
