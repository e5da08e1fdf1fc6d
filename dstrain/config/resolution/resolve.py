"""``resolve``: one complete DeepSpeed config from arguments, the user's config and facts.

The user's objects are not changed, and the same input gives the same config: it is resolved again
for each training and evaluation. The value of a key is

* the argument's, or a derived value, if the key is missing or "auto" in the user's config;
* the config's if the argument is at its default; the argument then adopts that value;
* the config's if the argument was changed to the same value;
* a conflict if the argument was changed to another value; one error lists all conflicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstrain.arguments import TrainingArguments
from dstrain.config import schema
from dstrain.config.facts import Facts
from dstrain.config.resolution import constraints
from dstrain.config.resolution.adoption import adopt
from dstrain.config.resolution.automatic import Automatic, choose_placement
from dstrain.config.resolution.batch import BatchUnit, batch_unit
from dstrain.config.resolution.draft import Draft, is_placeholder
from dstrain.config.resolution.effective import EffectiveConfig
from dstrain.config.resolution.filling import fill
from dstrain.config.resolution.resolved import Provenance, ResolvedConfig
from dstrain.config.resolution.rules import RULES, SCHEDULES, readable_arguments
from dstrain.config.resolution.rules.optimizer import chosen_optimizer
from dstrain.config.resolution.source import read_config
from dstrain.config.resolution.tree import drop, get, leaves
from dstrain.config.resolution.unread import find_unread
from dstrain.core.errors import ConfigError, Problem, raise_problems


def resolve(arguments: TrainingArguments, facts: Facts) -> ResolvedConfig:
    """Resolve the arguments and their ``deepspeed`` config for the given facts.

    Raises:
        ConfigError: keys are unknown or have wrong types, config and arguments are in conflict, or
            an "auto" cannot be filled; the error lists all problems.
    """
    draft = _begin(arguments, facts)
    adopt(draft)
    placed = _place(draft)
    _make_way_for_user_objects(draft)
    fill(draft)
    _show_placement(placed, draft)
    draft.problems += _lost_schedule(draft)
    _check_constraints(draft)
    if not placed.values.keys() & {"offload_optimizer", "offload_param"}:
        draft.problems += _unused_path(draft)
    draft.problems += _native_files_on_disk(draft)
    optimizer = None
    if not facts.user_optimizer:
        optimizer, found, remarks = chosen_optimizer(
            draft.view, draft.explicit, draft.changed, draft.label
        )
        draft.problems += found
        draft.warnings += remarks
    draft.problems += [_left_auto(p) for p, v in draft.leaves() if is_placeholder(p, v)]
    raise_problems(
        draft.problems,
        error=ConfigError,
        title="the arguments and the DeepSpeed config do not agree",
    )
    order = {rule.key: i for i, rule in enumerate(RULES)}
    shown = sorted(draft.leaves(), key=lambda item: order.get(item[0], len(order)))
    return ResolvedConfig(
        values=dict(shown),
        provenance={path: draft.provenance[path] for path, _ in shown},
        adopted=draft.adopted,
        warnings=tuple(draft.warnings),
        facts=facts,
        arguments=draft.arguments,
        batch_unit=draft.unit,
        optimizer=optimizer,
    )


def _begin(arguments: TrainingArguments, facts: Facts) -> Draft:
    """Begin a draft: check the user's config, and read the values of arguments and config.

    Raises:
        ConfigError: the config has unknown keys or wrong values.
    """
    given, label = read_config(arguments.deepspeed)
    raise_problems(
        schema.check(given), error=ConfigError, title=f"{label}: these keys cannot be used"
    )
    config, warnings = schema.normalise(given)
    _drop_nulls(config)
    unit = batch_unit(arguments, facts.world_size)
    changed = arguments.changed_fields()
    draft = Draft(
        label=label,
        facts=facts,
        explicit={p: v for p, v in leaves(config) if not is_placeholder(p, v)},
        changed=changed,
        unit=unit,
        config=config,
        arguments=readable_arguments(arguments),
        reasons={name: Provenance("argument", f"argument {name}") for name in changed},
        warnings=warnings,
    )
    draft.provenance |= {path: Provenance("config", label) for path in draft.explicit}
    total = draft.arguments["per_device_train_batch_size"]
    draft.arguments["per_device_train_batch_size"] = unit.per_rank(total)
    draft.problems += _uneven_batch(total, unit)
    if facts.found_batch is not None:
        _take_found_batch(draft, *facts.found_batch)
    return draft


def _uneven_batch(total: int, unit: BatchUnit) -> list[Problem]:
    if unit.splits_evenly(total):
        return []
    return [
        Problem(
            f"per_device_train_batch_size={total} with split_batches on {unit.num_ranks} ranks",
            "it is the batch of all ranks together, and does not split evenly",
            f"choose a multiple of {unit.num_ranks}",
        )
    ]


def _take_found_batch(draft: Draft, batch_size: int, accumulation: int) -> None:
    """Set micro-batch and accumulation to those that ``auto_find_batch_size`` found."""
    micro_batch = draft.unit.per_rank(batch_size)
    found = {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
    }
    draft.arguments |= found
    draft.changed = draft.changed.union(found)
    why = f"found by auto_find_batch_size: {micro_batch} x {accumulation} samples per rank"
    draft.reasons |= dict.fromkeys(found, Provenance("derived", why))


def _place(draft: Draft) -> Automatic:
    """Choose the ZeRO stage and the offloads that are left at "auto"."""
    placed = choose_placement(draft.arguments, draft.facts, draft.explicit)
    draft.arguments |= placed.values
    draft.reasons |= {name: Provenance("derived", why) for name, why in placed.reasons.items()}
    draft.warnings += [placed.warning] if placed.warning else []
    return placed


def _show_placement(placed: Automatic, draft: Draft) -> None:
    """Write an offload that was "auto" and became "none" to the config, with the reason."""
    for name, value in placed.values.items():
        if value == "none":
            draft.write(f"zero_optimization.{name}.device", value, draft.reasons[name])


def _make_way_for_user_objects(draft: Draft) -> None:
    """Drop the optimizer section if the user brings an optimizer.

    A section in the user's config for an object that the user brings is a problem.
    """
    facts = draft.facts
    passed = {"optimizer": facts.user_optimizer, "scheduler": facts.user_scheduler}
    draft.problems += [
        Problem(
            f"{draft.label} has a section {name!r}, and the Trainer has a {name} of its own",
            f"it was passed, or create_{name} is overridden, and only one of them can run",
            f"remove the section, or your own {name}",
        )
        for name, given in passed.items()
        if given and any(path.startswith(f"{name}.") for path in draft.explicit)
    ]
    if facts.user_optimizer:
        draft.config.pop("optimizer", None)


def _lost_schedule(draft: Draft) -> list[Problem]:
    """Return problems of arguments for a schedule that is replaced by the config's schedule."""
    kind = draft.explicit.get("scheduler.type")
    same = SCHEDULES.get(str(kind).lower())
    return [
        Problem(
            f"scheduler.type={kind!r} in {draft.label}, but argument {name}="
            f"{draft.arguments[name]!r}",
            "the config's own schedule runs, so the argument would be lost",
            f"remove the scheduler from the config, or leave {name} at its default",
        )
        for name in ("lr_scheduler_type", "lr_scheduler_kwargs")
        if kind is not None and name in draft.changed and draft.arguments[name] != same
    ]


def _check_constraints(draft: Draft) -> None:
    """Add problems and warnings of the filled config: of excluding keys and of unread keys."""
    values = {path: value for path, value in draft.leaves() if not is_placeholder(path, value)}
    effective = EffectiveConfig(values, draft.facts, draft.label)
    by_argument = frozenset(p for p, why in draft.provenance.items() if why.source == "argument")
    ignored, remarks = constraints.find_warnings(effective, by_argument)
    unread, without_effect = find_unread(values, draft.arguments, draft.label)
    draft.warnings += [*remarks, *without_effect]
    draft.problems += [*constraints.find_problems(effective), *ignored, *unread]


def _unused_path(draft: Draft) -> list[Problem]:
    """Return the problem of an ``nvme_path`` without offload to NVMe."""
    path, places = draft.arguments["nvme_path"], ("offload_optimizer", "offload_param")
    devices = [get(draft.config, f"zero_optimization.{name}.device") for name in places]
    if path is None or "nvme" in devices:
        return []
    return [
        Problem(
            f"nvme_path={path!r}",
            "neither optimizer nor parameters are offloaded to nvme, so nothing would be there",
            "set offload_optimizer or offload_param to nvme, or leave nvme_path out",
        )
    ]


def _native_files_on_disk(draft: Draft) -> list[Problem]:
    """Return the problem of DeepSpeed's own checkpoints of a run that is offloaded to NVMe.

    stage3.py: ``_rigid_load_state_dict`` forgets the swap files of the moments
    (``purge_state``), and copies into weights that are on the disk.
    """
    if draft.arguments.get("checkpoint_format", "dstrain") == "dstrain":
        return []
    places = ("offload_optimizer", "offload_param")
    on_disk = [n for n in places if get(draft.config, f"zero_optimization.{n}.device") == "nvme"]
    return [
        Problem(
            f"checkpoint_format='deepspeed' with {name}='nvme'",
            "DeepSpeed saves such a run, and goes on from that with other moments and losses",
            "leave checkpoint_format out",
        )
        for name in on_disk[:1]
    ]


def _left_auto(path: str) -> Problem:
    return Problem(
        f'{path}="auto"',
        "there is no argument and no rule to derive it from",
        "write a value, or remove the key to take DeepSpeed's default",
    )


def _drop_nulls(config: dict[str, Any]) -> None:
    """Remove keys with a rule whose value is null, which to DeepSpeed means a missing key."""
    for rule in RULES:
        parent, _, last = rule.key.rpartition(".")
        section = get(config, parent) if parent else config
        if isinstance(section, Mapping) and last in section and section[last] is None:
            drop(config, rule.key)
