"""Restoration of a learning-rate schedule from a checkpoint, also if arguments have changed.

If the run has the arguments of the saved run, the state of the schedule is restored as it was. With
other arguments (more steps in total, another warm-up, rate or kind of schedule) this run's schedule
is set to the state that it would have, had it been used from the first step. Comparing the saved
values with those before the saved run's first step shows which values come from arguments and which
from training.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from dstrain.core.errors import CheckpointError, Problem
from dstrain.engine.optimizers import MetricSchedule

Groups = Sequence[dict[str, Any]]

STEERED = (
    "lr",
    "initial_lr",
    "max_lr",
    "min_lr",
    "betas",
    "momentum",
    "base_momentum",
    "max_momentum",
)
"""Entries of parameter groups that schedules may set."""
# Entries in the state of every schedule of torch.
_OF_ALL_SCHEDULES = frozenset(["_step_count", "last_epoch", "base_lrs", "_last_lr"])
# Most steps that a schedule may have taken for each step of the engine.
_MOST_STEPS_AHEAD = 10_000
_RATE = ("lr",)
_RATE_AND_MOMENTUM = ("lr", "betas", "momentum")


def schedule_state(schedule: Any) -> dict[str, Any] | None:
    """Return a copy of a schedule's ``state_dict``; None if there is no schedule or it has none."""
    if schedule is None or not hasattr(schedule, "state_dict"):
        return None
    return copy.deepcopy(schedule.state_dict())


def last_rates(schedule: Any) -> list[float] | None:
    """Return the learning rates that a schedule set last; None if it does not record them."""
    rates = getattr(schedule, "_last_lr", None)
    return None if rates is None else [float(rate) for rate in rates]


def restore_schedule(
    schedule: Any,
    groups: Groups,
    saved: Mapping[str, Any],
    *,
    begun: Mapping[str, Any] | None,
    fresh: Mapping[str, Any],
    num_steps: int,
) -> tuple[str, ...]:
    """Set a schedule that has taken no step to the step of the saved run.

    A schedule that can only be stepped takes all ``num_steps`` steps, some microseconds each.

    Args:
        schedule: the schedule of this run.
        groups: the parameter groups whose rates the schedule sets; they get those of the next step.
        saved: the ``state`` of the saved run's schedule, and its last ``rates``.
        begun: schedule and groups of the saved run before its first step; None if not recorded.
        fresh: schedule and groups of this run before its first step.
        num_steps: steps that changed the weights in the saved run.

    Returns:
        the entries of parameter groups that now have this run's values; the caller restores all
        other entries.
    """
    state, before = saved["state"], None if begun is None else begun["schedule"]
    inner = schedule.schedule if isinstance(schedule, MetricSchedule) else schedule
    if isinstance(inner, LRScheduler):
        _check_attributes(inner, state)
    if isinstance(schedule, MetricSchedule):
        return _restore_metric_schedule(schedule, groups, state, begun, fresh)
    if type(schedule) is LambdaLR:
        return _restore_factors(schedule, groups, state, before, fresh["schedule"], num_steps)
    if hasattr(schedule, "last_batch_iteration"):
        return _restore_closed_form(schedule, groups, saved, num_steps)
    same_kind = set(state) == set(fresh["schedule"])
    if same_kind and not _arguments_changed(state, before, fresh["schedule"]):
        schedule.load_state_dict(copy.deepcopy(state))
        return ()
    _step_through(schedule, num_steps)
    return STEERED


def _check_attributes(schedule: LRScheduler, state: Any) -> None:
    """Check that a saved state fits a schedule of torch, which would accept any attributes.

    Raises:
        ValueError: the state would replace a method of the schedule, or a value by one of another
            type.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"its state is a {type(state).__name__}")
    here = schedule.state_dict()
    for name, value in state.items():
        is_method = callable(getattr(type(schedule), str(name), None))
        if is_method or name == "optimizer" or str(name).startswith("__"):
            raise ValueError(f"{name} is no part of the state of a {type(schedule).__name__}")
        if name in here and not _same_kind(here[name], value, strict=name in _OF_ALL_SCHEDULES):
            raise ValueError(f"{name} is {value!r}, where this run's has {here[name]!r}")


def _same_kind(here: Any, there: Any, *, strict: bool) -> bool:
    """Tell whether a saved value of a schedule's state can replace the value of this run.

    Args:
        here: value of this run.
        there: value of the checkpoint.
        strict: whether None fits only None, and lists must have the same length.
    """
    here, there = _plain(here), _plain(there)
    if here is None or (there is None and not strict):
        return True
    if isinstance(here, (int, float)):
        return isinstance(there, (int, float))
    if isinstance(here, (list, tuple)):
        return (
            isinstance(there, (list, tuple))
            and (not strict or len(here) == len(there))
            and all(_same_kind(a, b, strict=strict) for a, b in zip(here, there, strict=False))
        )
    if isinstance(here, Mapping):
        return isinstance(there, Mapping)
    return not isinstance(here, str) or isinstance(there, str)


def steps_done(saved: Mapping[str, Any]) -> int:
    """Count the steps that changed the weights in the saved run, by its schedule or counters.

    Raises:
        CheckpointError: the count of the schedule is impossible.
    """
    state, counters = saved["schedule"] or {}, saved["counters"]
    if "last_batch_iteration" in state:  # DeepSpeed's: -1 before the first step
        done = _step_count(state["last_batch_iteration"], first=-1) + 1
    elif "last_epoch" in state and not _follows_metric(state):
        done = max(0, _step_count(state["last_epoch"], first=-1))
    else:
        done = int(counters["global_steps"]) - int(counters["skipped_steps"])
    # A user's code may step a schedule as well, but not without end.
    if not 0 <= done <= _MOST_STEPS_AHEAD * (int(counters["global_steps"]) + 1):
        raise CheckpointError(
            Problem(
                f"the learning-rate schedule in the checkpoint has taken {done} steps",
                f"the run had done {counters['global_steps']}, "
                f"{counters['skipped_steps']} of them without a change",
                "use another checkpoint",
            )
        )
    return done


def _step_count(value: Any, *, first: int) -> int:
    """Return the step count of a schedule as an integer.

    Raises:
        CheckpointError: it is no number, or below ``first``.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= first:
        raise CheckpointError(
            Problem(f"the learning-rate schedule in the checkpoint is at step {value!r}")
        )
    return int(value)


def unchanged_in_training(saved: Any, begun: Any) -> bool:
    """Tell whether a saved value equals the value before the saved run's first step."""
    return _plain(saved) == _plain(begun)


def _restore_factors(
    schedule: LambdaLR,
    groups: Groups,
    state: Mapping[str, Any],
    before: Mapping[str, Any] | None,
    fresh: Mapping[str, Any],
    num_steps: int,
) -> tuple[str, ...]:
    """Restore a ``LambdaLR``, whose rates are initial rates times a function of the step.

    Returns:
        as ``restore_schedule``.
    """
    if "lr_lambdas" in state and "base_lrs" in state:
        before = state if before is None or "base_lrs" not in before else before
        kept = {
            name: state[name] if _same(before[name], fresh[name]) else fresh[name]
            for name in ("base_lrs", "lr_lambdas")
        }
        schedule.load_state_dict(copy.deepcopy({**state, **kept}))
        last_rates_set = state.get("_last_lr")
    else:
        schedule._step_count = num_steps + 1
        last_rates_set = None
    schedule.last_epoch = num_steps
    rates = [
        base * factor(num_steps)
        for factor, base in zip(schedule.lr_lambdas, schedule.base_lrs, strict=True)
    ]
    if last_rates_set is not None and _same(last_rates_set, rates):
        return ()
    _put_rates(groups, rates)
    schedule._last_lr = rates
    return _RATE


def _restore_closed_form(
    schedule: Any, groups: Groups, saved: Mapping[str, Any], num_steps: int
) -> tuple[str, ...]:
    """Restore a schedule of DeepSpeed, which computes rates and momenta from a step count alone.

    Returns:
        as ``restore_schedule``.
    """
    if num_steps:
        schedule.step(num_steps - 1)
    moves = _RATE_AND_MOMENTUM if getattr(schedule, "cycle_momentum", False) else _RATE
    same = "last_batch_iteration" in saved["state"] and _same(
        saved["rates"], [group["lr"] for group in groups]
    )
    return tuple(name for name in moves if name != "lr") if same else moves


def _restore_metric_schedule(
    schedule: MetricSchedule,
    groups: Groups,
    state: Mapping[str, Any],
    begun: Mapping[str, Any] | None,
    fresh: Mapping[str, Any],
) -> tuple[str, ...]:
    """Restore the history of a schedule that steps by metrics, keeping this run's arguments.

    Its rates depend on the metrics of the saved run, so they cannot be computed again. If this run
    has another learning rate, the saved rates are scaled by the ratio of the two.

    Returns:
        as ``restore_schedule``.
    """
    if not _follows_metric(state):
        return _RATE
    now, before = fresh["schedule"], None if begun is None else begun["schedule"]
    merged = {
        name: now[name]
        if before is not None
        and name in now
        and name in before
        and unchanged_in_training(value, before[name])
        else value
        for name, value in state.items()
    }
    schedule.schedule.load_state_dict(copy.deepcopy(merged))
    if begun is None or len(begun["groups"]) != len(groups):
        return ()
    initial = [float(group["lr"]) for group in fresh["groups"]]
    earlier = [float(group["lr"]) for group in begun["groups"]]
    if initial == earlier or not all(earlier):
        return ()
    reached = state.get("_last_lr") or earlier
    rates = [r * new / old for r, new, old in zip(reached, initial, earlier, strict=True)]
    _put_rates(groups, rates)
    schedule.schedule._last_lr = rates
    return _RATE


def _follows_metric(state: Mapping[str, Any]) -> bool:
    """Tell whether a state is that of torch's ``ReduceLROnPlateau``."""
    return "num_bad_epochs" in state


def _step_through(schedule: Any, num_steps: int) -> None:
    """Step a schedule until it has taken ``num_steps`` steps."""
    with warnings.catch_warnings():
        # torch warns that the optimizer has taken no step; it took them in the saved run.
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*", category=UserWarning)
        for _ in range(num_steps - max(0, getattr(schedule, "last_epoch", 0))):
            schedule.step()


def _arguments_changed(state: Any, before: Any, fresh: Any) -> bool:
    """Tell whether arguments of the schedule differ between the saved run and this one.

    Arguments are entries of the state that training did not change.
    """
    if before is None:
        return False
    saved, begun, now = (dict(_leaves(part)) for part in (state, before, fresh))
    if set(begun) != set(now):
        return True
    return any(
        begun[place] != now[place]
        for place in begun
        if place in saved and saved[place] == begun[place]
    )


def _leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield each single value of a nested state after its path of keys and indices."""
    value = _plain(value)
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(part, (*place, name))
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _leaves(part, (*place, index))
    else:
        yield place, value


def _same(one: Any, other: Any) -> bool:
    """Tell whether two nested states have equal values, tensors counting as lists."""
    return dict(_leaves(one)) == dict(_leaves(other))


def _plain(value: Any) -> Any:
    """Return a tensor as a number or nested list, and any other value as it is."""
    return value.tolist() if isinstance(value, torch.Tensor) else value


def _put_rates(groups: Groups, rates: Sequence[Any]) -> None:
    """Set the learning rates of parameter groups."""
    for group, rate in zip(groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
