"""``resolve``: arguments, the user's config and facts become one frozen, complete DeepSpeed config.

Pure and repeatable: nothing is changed in place, so it runs again for every training and
evaluation, and twice gives the same. Precedence for a key:

* missing or "auto" in the user's config -> from the argument, or derived;
* explicit there, argument at its default -> the config's value, which the arguments then adopt;
* explicit there, argument changed to the same value -> that value;
* explicit there, argument changed to another value -> a conflict; all conflicts are one error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dstrain.arguments import TrainingArguments
from dstrain.config import optimizers, schema
from dstrain.config.facts import Facts
from dstrain.config.resolution import constraints
from dstrain.config.resolution.automatic import choose_placement
from dstrain.config.resolution.resolved import Provenance, ResolvedConfig
from dstrain.config.resolution.rules import (
    RULES,
    SCHEDULES,
    Binding,
    Derivation,
    Derived,
    View,
    readable_arguments,
)
from dstrain.config.resolution.rules.optimizer import choose
from dstrain.config.resolution.source import read_config
from dstrain.config.resolution.tree import drop, get, leaves, put
from dstrain.config.resolution.unread import find_unread
from dstrain.core.errors import ConfigError, Problem, raise_problems


def resolve(arguments: TrainingArguments, facts: Facts) -> ResolvedConfig:
    """Resolve the arguments and their ``deepspeed`` config for the given facts.

    Raises:
        ConfigError: listing every unknown key, wrong type, conflict between config and arguments,
            and "auto" for which there is nothing to derive.
    """
    given, label = read_config(arguments.deepspeed)
    raise_problems(
        schema.check(given), error=ConfigError, title=f"{label}: these keys cannot be used"
    )
    config, warnings = schema.normalise(given)
    _drop_nulls(config)
    explicit = {p: v for p, v in leaves(config) if not _is_auto(p, v)}
    problems: list[Problem] = []
    chosen = readable_arguments(arguments)
    if arguments.splits_batches:
        problems += _split_batches(chosen, facts.world_size)
    changed = arguments.changed_fields()
    adopted, reasons = _adopt(chosen, changed, explicit, facts, problems, label)
    reasons |= {name: Provenance("argument", f"argument {name}") for name in changed}
    chosen |= adopted
    provenance: dict[str, Provenance] = {path: Provenance("config", label) for path in explicit}
    automatic = choose_placement(chosen, facts, explicit)
    chosen |= automatic.values
    reasons |= {name: Provenance("derived", why) for name, why in automatic.reasons.items()}
    warnings += [automatic.warning] if automatic.warning else []
    problems += _displaced(explicit, facts, label)
    if facts.own_optimizer:
        config.pop("optimizer", None)
    for rule in RULES:
        if facts.own_optimizer and rule.key.startswith("optimizer."):
            continue
        view = View(chosen, facts, config)
        _fill(rule, config, explicit, provenance, view, reasons, problems, warnings, label)
    _show_decided(config, provenance, automatic.values, reasons)
    problems += _lost_schedule(explicit, changed, chosen, label)
    problems += _constraints(config, provenance, chosen, facts, warnings, label)
    if not automatic.values.keys() & {"offload_optimizer", "offload_param"}:
        problems += _unused(chosen, config)
    build = None
    if not facts.own_optimizer:
        build, found, remarks = choose(View(chosen, facts, config), explicit, changed, label)
        problems += found
        warnings += remarks
    for path, value in leaves(config):
        if _is_auto(path, value):
            problems.append(_left_auto(path))
    raise_problems(
        problems, error=ConfigError, title="the arguments and the DeepSpeed config do not agree"
    )
    order = {rule.key: i for i, rule in enumerate(RULES)}
    shown = sorted(leaves(config), key=lambda item: order.get(item[0], len(order)))
    return ResolvedConfig(
        values=dict(shown),
        provenance={path: provenance[path] for path, _ in shown},
        adopted=adopted,
        warnings=tuple(warnings),
        facts=facts,
        arguments=chosen,
        optimizer=build,
    )


def _split_batches(chosen: dict[str, Any], world_size: int) -> list[Problem]:
    """Divide a batch size that counts the samples of all ranks by the number of ranks."""
    total = chosen["per_device_train_batch_size"]
    chosen["per_device_train_batch_size"] = max(1, total // world_size)
    if total % world_size == 0:
        return []
    return [
        Problem(
            f"per_device_train_batch_size={total} with split_batches on {world_size} ranks",
            "it is the batch of all ranks together, and does not split evenly",
            f"choose a multiple of {world_size}",
        )
    ]


def _show_decided(
    config: dict[str, Any],
    provenance: dict[str, Provenance],
    decided: Mapping[str, str],
    reasons: Mapping[str, Provenance],
) -> None:
    """Write down that an offload of "auto" became "none", so that the reason is shown."""
    for name, value in decided.items():
        if value == "none":
            key = f"zero_optimization.{name}.device"
            put(config, key, value)
            provenance[key] = reasons[name]


def _adopt(
    chosen: Mapping[str, Any],
    changed: frozenset[str],
    explicit: Mapping[str, Any],
    facts: Facts,
    problems: list[Problem],
    label: str,
) -> tuple[dict[str, Any], dict[str, Provenance]]:
    """Return values that arguments take from the user's config, and why; collect conflicts."""
    adopted: dict[str, Any] = {}
    settled: dict[str, Any] = {}
    reasons: dict[str, Provenance] = {}
    for rule in RULES:
        if not isinstance(rule, Binding) or rule.key not in explicit:
            continue
        try:
            values = rule.adopt(explicit[rule.key])
        except TypeError:
            values = ()
        if len(values) != len(rule.arguments):
            problems.append(
                Problem(
                    f"{rule.key}={explicit[rule.key]!r}",
                    f"it stands for {' and '.join(rule.arguments)}: one value for each",
                )
            )
            continue
        for name, value in zip(rule.arguments, values, strict=True):
            if value is None:
                if name in changed:
                    problems.append(
                        _conflict(rule.key, explicit[rule.key], name, chosen[name], label)
                    )
                continue
            if name in changed:
                variant = name == "optim" and optimizers.stands_for(
                    explicit[rule.key], chosen[name]
                )
                if not _equal(value, chosen[name]) and not variant:
                    problems.append(
                        _conflict(rule.key, explicit[rule.key], name, chosen[name], label)
                    )
                continue
            if name in settled and not _equal(value, settled[name]):
                problems.append(
                    Problem(
                        f"{rule.key}={explicit[rule.key]!r} in {label}",
                        f"another key of it sets {name} to {settled[name]!r}",
                        "make the two equal",
                    )
                )
                continue
            settled[name] = value
            reasons[name] = Provenance("config", f"{rule.key} in {label}")
            if not _equal(value, chosen[name]):
                adopted[name] = value
    _adopt_global_batch({**chosen, **adopted}, changed, explicit, facts, adopted, reasons)
    return adopted, reasons


def _adopt_global_batch(
    chosen: Mapping[str, Any],
    changed: frozenset[str],
    explicit: Mapping[str, Any],
    facts: Facts,
    adopted: dict[str, Any],
    reasons: dict[str, Provenance],
) -> None:
    """Derive accumulation from a ``train_batch_size`` of the user's if nothing else decides it."""
    total = explicit.get("train_batch_size")
    decided = "gradient_accumulation_steps" in explicit or "gradient_accumulation_steps" in changed
    if total is None or decided:
        return
    micro, world = chosen["per_device_train_batch_size"], facts.world_size
    if total % (micro * world) == 0 and total >= micro * world:
        adopted["gradient_accumulation_steps"] = total // (micro * world)
        reasons["gradient_accumulation_steps"] = Provenance(
            "derived", f"train_batch_size {total} / (micro-batch {micro} x ranks {world})"
        )


def _fill(
    rule: Binding | Derivation,
    config: dict[str, Any],
    explicit: Mapping[str, Any],
    provenance: dict[str, Provenance],
    view: View,
    reasons: Mapping[str, Provenance],
    problems: list[Problem],
    warnings: list[str],
    label: str,
) -> None:
    """Write one key where the user left it open; check it where the rule allows one value only."""
    if rule.key in explicit:
        if isinstance(rule, Derivation):
            problems += _disagreements(rule, explicit[rule.key], view, reasons, label)
        return
    present = get(config, rule.key) is not None
    optional = rule.when_present if isinstance(rule, Binding) else rule.only_auto
    if optional and not present and not _takes(config, rule.key):
        return
    derived = rule.derive(view)
    if derived is None:
        # "auto" with nothing to say here: without the key DeepSpeed's default holds. What only the
        # length of the run can fill is resolved again when training starts.
        if present:
            drop(config, rule.key)
            if rule.key.startswith("scheduler.") and view.facts.num_training_steps is None:
                warnings.append(f"{rule.key} is filled when training starts: it needs max_steps")
        return
    put(config, rule.key, derived.value)
    if derived.how:
        provenance[rule.key] = Provenance("derived", derived.how)
    elif isinstance(rule, Binding):
        names = ", ".join(rule.arguments)
        default = Provenance("default", f"default of argument {names}")
        known = [reasons[name] for name in rule.arguments if name in reasons]
        details = ", ".join(dict.fromkeys(reason.detail for reason in known))
        provenance[rule.key] = Provenance(known[0].source, details) if known else default


def _disagreements(
    rule: Derivation, given: Any, view: View, reasons: Mapping[str, Provenance], label: str
) -> list[Problem]:
    """Return the problems of an explicit value for a key that could have been derived."""
    if not (rule.exact or rule.conflicts):
        return []
    derived = rule.derive(view)
    if derived is None or _equal(derived.value, given):
        return []
    if rule.exact:
        return [_bad_arithmetic(rule.key, given, derived, view.facts)]
    changed = [n for n in rule.reads if n in reasons and reasons[n].source == "argument"]
    return [_conflict(rule.key, given, name, getattr(view, name), label) for name in changed]


def _lost_schedule(
    explicit: Mapping[str, Any], changed: frozenset[str], chosen: Mapping[str, Any], label: str
) -> list[Problem]:
    """Refuse arguments about a schedule that would not run, as the config brings its own."""
    kind = explicit.get("scheduler.type")
    same = SCHEDULES.get(str(kind).lower())
    return [
        Problem(
            f"scheduler.type={kind!r} in {label}, but argument {name}={chosen[name]!r}",
            "the config's own schedule runs, so the argument would be lost",
            f"remove the scheduler from the config, or leave {name} at its default",
        )
        for name in ("lr_scheduler_type", "lr_scheduler_kwargs")
        if kind is not None and name in changed and chosen[name] != same
    ]


def _takes(config: Mapping[str, Any], path: str) -> bool:
    """Tell whether the user's config has a parameter's section, with a type that knows it.

    Left out, the parameter would get DeepSpeed's default: a schedule of ``WarmupLR`` rises to 1e-3
    in 1000 steps, whatever the arguments say.
    """
    section, _, _ = path.partition(".params.")
    kind = get(config, f"{section}.type")
    return isinstance(kind, str) and kind != schema.AUTO and schema.is_known(path, kind=kind)


def _displaced(explicit: Mapping[str, Any], facts: Facts, label: str) -> list[Problem]:
    """Refuse sections of the user's config that an object of the user's would displace."""
    passed = {"optimizer": facts.own_optimizer, "scheduler": facts.own_scheduler}
    return [
        Problem(
            f"{label} has a section {name!r}, and the Trainer has a {name} of its own",
            f"it was passed, or create_{name} is overridden, and only one of them can run",
            f"remove the section, or your own {name}",
        )
        for name, given in passed.items()
        if given and any(path.startswith(f"{name}.") for path in explicit)
    ]


def _constraints(
    config: Mapping[str, Any],
    provenance: Mapping[str, Provenance],
    chosen: Mapping[str, Any],
    facts: Facts,
    warnings: list[str],
    label: str,
) -> list[Problem]:
    """Return problems of the filled config: keys that exclude each other or that nothing reads."""
    values = {path: value for path, value in leaves(config) if not _is_auto(path, value)}
    effective = constraints.EffectiveConfig(values, facts, label)
    by_argument = frozenset(p for p, reason in provenance.items() if reason.source == "argument")
    ignored, remarks = constraints.find_warnings(effective, by_argument)
    unread, without_effect = find_unread(values, chosen, label)
    warnings += [*remarks, *without_effect]
    return [*constraints.find_problems(effective), *ignored, *unread]


def _unused(chosen: Mapping[str, Any], config: Mapping[str, Any]) -> list[Problem]:
    """Refuse a path for NVMe where nothing goes there."""
    places = ("offload_optimizer", "offload_param")
    devices = [get(config, f"zero_optimization.{name}.device") for name in places]
    if chosen["nvme_path"] is None or "nvme" in devices:
        return []
    return [
        Problem(
            f"nvme_path={chosen['nvme_path']!r}",
            "neither optimizer nor parameters are offloaded to nvme, so nothing would be there",
            "set offload_optimizer or offload_param to nvme, or leave nvme_path out",
        )
    ]


def _conflict(key: str, given: Any, name: str, value: Any, label: str) -> Problem:
    return Problem(
        f"{key}={given!r} in {label}, but argument {name}={value!r}",
        "both were set, to different values",
        f'set {key} to "auto" to take the argument, or leave {name} at its default',
    )


def _bad_arithmetic(key: str, given: Any, derived: Derived, facts: Facts) -> Problem:
    ranks = f"{facts.world_size} rank{'' if facts.world_size == 1 else 's'}"
    how = f"change micro-batch or accumulation so that their product with {ranks} is {given}"
    if given % facts.world_size:
        how = f"give a multiple of {ranks}"
    return Problem(
        f"{key}={given!r}", f"{derived.how} = {derived.value}", f'set {key} to "auto", or {how}'
    )


def _left_auto(path: str) -> Problem:
    return Problem(
        f'{path}="auto"',
        "there is no argument and no rule to derive it from",
        "write a value, or remove the key to take DeepSpeed's default",
    )


def _is_auto(path: str, value: Any) -> bool:
    return value == "auto" and not schema.auto_is_a_value(path)


def _equal(a: Any, b: Any) -> bool:
    """Compare whatever the spelling: "5e-5" equals 5e-5, (0.9, 0.95) equals [0.9, 0.95]."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b or (isinstance(a, bool) and isinstance(b, bool) and a == b)
    try:
        return math.isclose(float(a), float(b), rel_tol=1e-9)
    except (TypeError, ValueError):
        return bool(a == b)


def _drop_nulls(config: dict[str, Any]) -> None:
    """Remove nulls where a rule knows a value: to DeepSpeed null means that the key is missing."""
    for rule in RULES:
        parent, _, last = rule.key.rpartition(".")
        section = get(config, parent) if parent else config
        if isinstance(section, Mapping) and last in section and section[last] is None:
            drop(config, rule.key)
