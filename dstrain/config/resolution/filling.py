"""Filling: each rule sets its key if the user did not, or else checks the user's value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstrain.config import schema
from dstrain.config.resolution.draft import Draft, is_equal
from dstrain.config.resolution.resolved import Provenance
from dstrain.config.resolution.rules import RULES, Binding, Derivation, Derived
from dstrain.config.resolution.tree import drop, get
from dstrain.core.errors import Problem


def fill(draft: Draft) -> None:
    """Apply all rules in order, those of the optimizer only if the user brings none."""
    for rule in RULES:
        if draft.facts.user_optimizer and rule.key.startswith("optimizer."):
            continue
        if rule.key not in draft.explicit:
            _fill_key(rule, draft)
        elif isinstance(rule, Derivation):
            draft.problems += _disagreements(rule, draft)


def _fill_key(rule: Binding | Derivation, draft: Draft) -> None:
    """Set the key of a rule to its derived value, or leave the key out."""
    present = get(draft.config, rule.key) is not None
    optional = rule.when_present if isinstance(rule, Binding) else rule.only_auto
    if optional and not present and not _has_section_for(rule.key, draft.config):
        return
    derived = rule.derive(draft.view)
    if derived is not None:
        draft.write(rule.key, derived.value, _reason(rule, derived, draft))
    elif present:
        # "auto" without a derived value: the key is dropped, and DeepSpeed uses its default. Keys
        # that need the length of the run are filled by the resolution at the start of training.
        drop(draft.config, rule.key)
        if rule.key.startswith("scheduler.") and draft.facts.num_training_steps is None:
            draft.warnings.append(f"{rule.key} is filled when training starts: it needs max_steps")


def _reason(rule: Binding | Derivation, derived: Derived, draft: Draft) -> Provenance:
    """Return the reason for a rule's value: its formula, or the origin of its arguments."""
    if derived.how or isinstance(rule, Derivation):
        return Provenance("derived", derived.how)
    known = [draft.reasons[name] for name in rule.arguments if name in draft.reasons]
    if not known:
        return Provenance("default", f"default of argument {', '.join(rule.arguments)}")
    details = ", ".join(dict.fromkeys(reason.detail for reason in known))
    return Provenance(known[0].source, details)


def _has_section_for(path: str, config: Mapping[str, Any]) -> bool:
    """Tell whether the user's config has the parameter's section, of a type with that parameter.

    A parameter that is left out there would get DeepSpeed's default: a ``WarmupLR`` rises to 1e-3
    in 1000 steps, whatever the arguments are.
    """
    section, _, _ = path.partition(".params.")
    kind = get(config, f"{section}.type")
    return isinstance(kind, str) and kind != schema.AUTO and schema.is_known(path, kind=kind)


def _disagreements(rule: Derivation, draft: Draft) -> list[Problem]:
    """Return the problems of the user's value for a key that a rule derives."""
    if not (rule.exact or rule.conflicts):
        return []
    derived = rule.derive(draft.view)
    if derived is None or is_equal(derived.value, draft.explicit[rule.key]):
        return []
    if rule.exact:
        return [_wrong_product(rule.key, derived, draft)]
    set_by_user = [
        name
        for name in rule.reads
        if name in draft.reasons and draft.reasons[name].source == "argument"
    ]
    return [draft.conflict(rule.key, name) for name in set_by_user]


def _wrong_product(key: str, derived: Derived, draft: Draft) -> Problem:
    given, world_size = draft.explicit[key], draft.facts.world_size
    ranks = f"{world_size} rank{'' if world_size == 1 else 's'}"
    how = f"change micro-batch or accumulation so that their product with {ranks} is {given}"
    if given % world_size:
        how = f"give a multiple of {ranks}"
    return Problem(
        f"{key}={given!r}", f"{derived.how} = {derived.value}", f'set {key} to "auto", or {how}'
    )
