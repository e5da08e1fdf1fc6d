"""The state of an engine beside tensors: counters, loss scale, rates of groups, schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dstrain.core.errors import CheckpointError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import all_or_none
from dstrain.engine.state.optimizer_state import (
    check_number_of_groups,
    group_values,
    same_for_all,
    set_group_values,
)
from dstrain.engine.state.schedule import (
    STEERED,
    last_rates,
    schedule_state,
    steps_done,
    take_up_schedule,
    unchanged_in_training,
)

if TYPE_CHECKING:
    from dstrain.engine.engine import Engine

logger = get_logger(__name__)

_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
# Of DeepSpeed's DynamicLossScaler, and of LossScaleConfig at stage 0, which lacks the last.
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read_begun(engine: Engine) -> dict[str, Any]:
    """Return schedule and parameter groups as a run's arguments say, before the first step."""
    return {
        "schedule": schedule_state(_schedule(engine)),
        "groups": group_values(_basic(engine.optimizer)),
    }


def read_progress(engine: Engine) -> dict[str, Any]:
    """Return plain values of an engine that do not depend on the rank.

    Raises:
        CheckpointError: a schedule without ``state_dict``.
    """
    scaler, schedule = _scaler(engine), _schedule(engine)
    state = schedule_state(schedule)
    if schedule is not None and state is None:
        raise CheckpointError(
            Problem(
                f"the learning-rate schedule, a {type(schedule).__name__}, has no state_dict",
                "a run that resumes could not go on with its rates",
                "give it state_dict and load_state_dict",
            )
        )
    return {
        "counters": {name: getattr(engine.model, name) for name in _COUNTERS},
        "loss_scale": None
        if scaler is None
        else {name: getattr(scaler, name) for name in _SCALE if hasattr(scaler, name)},
        "optimizer": type(_basic(engine.optimizer)).__name__,
        "groups": group_values(_basic(engine.optimizer)),
        "schedule": state,
        "rates": last_rates(schedule),
        "begun": engine.begun,
        "buffers": engine.buffers.found(),
    }


def write_progress(engine: Engine, saved: dict[str, Any]) -> None:
    """Restore what ``read_progress`` returned, an ``EngineRecord``; a collective of all ranks.

    The loss scale is left alone unless both runs use fp16; a scaler without hysteresis (stage 0)
    and one with it (the other stages) take from each other what both have. Of schedule and
    parameter groups comes back what training has made of them: where an argument of this run is
    another one, it counts.

    Raises:
        CheckpointError: other parameter groups, a schedule where there was none, or a state that
            this run's schedule cannot take up; raised on every rank.
    """
    for name in _COUNTERS:
        setattr(engine.model, name, saved["counters"][name])
    if saved.get("buffers") is not None:  # not in older checkpoints, nor in imports
        engine.buffers.take_up(saved["buffers"])
    scaler, scale = _scaler(engine), saved["loss_scale"] or {}
    for name in _SCALE:
        if scaler is not None and hasattr(scaler, name) and scale.get(name) is not None:
            setattr(scaler, name, scale[name])
    with all_or_none():
        _write_groups(engine, saved)


def _write_groups(engine: Engine, saved: dict[str, Any]) -> None:
    """Restore parameter groups and schedule."""
    schedule = _schedule(engine)
    if (schedule is None) != (saved["schedule"] is None):
        there, here = ("a", "none") if schedule is None else ("no", "one")
        raise CheckpointError(
            Problem(
                f"the checkpoint has {there} learning-rate schedule, this run has {here}",
                "",
                "use the schedule of the run that wrote it",
            )
        )
    optimizer = _basic(engine.optimizer)
    check_number_of_groups(len(optimizer.param_groups), saved["groups"])
    assert engine.begun is not None, "of an engine that trains"
    # Where DeepSpeed's own layout was read, the groups are those of the checkpoint.
    fresh = [{k: v for k, v in g.items() if k in STEERED} for g in engine.begun["groups"]]
    set_group_values(optimizer, fresh)
    placed = () if schedule is None else _take_up(schedule, optimizer.param_groups, saved, engine)
    instead = _values_of_this_run(optimizer.param_groups, placed, saved, engine)
    set_group_values(optimizer, saved["groups"], instead=instead)


def _take_up(
    schedule: Any, groups: list[dict[str, Any]], saved: dict[str, Any], engine: Engine
) -> tuple[str, ...]:
    """Put the schedule where the saved run stood, and return the group entries that it sets."""
    count = len(groups)
    begun = saved.get("begun")  # older checkpoints and imported ones have none
    if begun is not None and begun["schedule"] is not None:
        begun = {**begun, "schedule": _for_groups(begun["schedule"], begun["groups"], count)}
    rates = saved.get("rates") or [group["lr"] for group in saved["groups"]]
    rates = _for_groups({"rates": rates}, saved["groups"], count)["rates"]
    try:
        placed = take_up_schedule(
            schedule,
            groups,
            {"state": _for_groups(saved["schedule"], saved["groups"], count), "rates": rates},
            begun=begun,
            fresh=engine.begun or {},
            num_steps=steps_done(saved),
        )
    except CheckpointError:
        raise
    except Exception as error:  # of the schedule's own, which can be any class of a user's
        raise CheckpointError(
            Problem(
                f"the learning-rate schedule, a {type(schedule).__name__}, cannot take up the "
                "state in the checkpoint",
                f"{type(error).__name__}: {error}",
                "use the schedule of the run that wrote it, or another checkpoint",
            )
        ) from error
    if "lr" in placed:
        logger.warning(
            "this run's schedule of learning rates is not the checkpoint's: the rate of the next "
            "step is %g, the checkpoint's schedule had %g",
            groups[0]["lr"],
            rates[0],
        )
    return placed


def _values_of_this_run(
    groups: list[dict[str, Any]], placed: tuple[str, ...], saved: dict[str, Any], engine: Engine
) -> list[dict[str, Any]]:
    """Return what parameter groups keep: what the schedule has set, and changed arguments.

    A saved value that is what it was before the first step was an argument; a rate that a schedule
    steers is not, even where it is back at its beginning.
    """
    count = len(groups)
    there, begun = (
        _aligned(values, count)
        for values in (saved["groups"], (saved.get("begun") or {}).get("groups"))
    )
    found = [{name: group[name] for name in placed if name in group} for group in groups]
    if there is None or begun is None or engine.begun is None:
        return found
    steered = () if saved["schedule"] is None else ("lr",)
    for own, values, before, now in zip(found, there, begun, engine.begun["groups"], strict=True):
        for name in values.keys() & before.keys() & now.keys() - {*placed, *steered}:
            if unchanged_in_training(values[name], before[name]):
                own[name] = now[name]
    return found


def _aligned(values: list[dict[str, Any]] | None, count: int) -> list[dict[str, Any]] | None:
    """Return values of ``count`` groups, if they are that many or all alike; else None."""
    if values and len(values) != count and same_for_all(values):
        return values[:1] * count
    return values if values is not None and len(values) == count else None


def _for_groups(state: Any, saved: list[dict[str, Any]], count: int) -> Any:
    """Return a schedule's state for another number of groups, where the saved ones were alike.

    torch keeps a rate per group in lists, and a list too short would leave groups without one.
    """
    if state is None or len(saved) == count or not saved or not same_for_all(saved):
        return state
    fitted = dict(state)
    for key, value in state.items():
        if isinstance(value, list) and len(value) == len(saved):
            fitted[key] = value[:1] * count
    return fitted


def begin_load(engine: Engine) -> None:
    """Release gathered parameters of stage 3, which would be stale, before regions are written.

    Not before ``finish_load`` may the model be used again.
    """
    if hasattr(engine.optimizer, "checkpoint_event_prologue"):
        engine.optimizer.checkpoint_event_prologue()


def finish_load(engine: Engine) -> None:
    """Make the weights that the model computes with follow the master weights; a collective."""
    with torch.no_grad():
        _refresh_weights(engine.optimizer)
    if hasattr(engine.optimizer, "checkpoint_event_epilogue"):
        engine.optimizer.checkpoint_event_epilogue()


def _refresh_weights(optimizer: Any) -> None:
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for index, flat in enumerate(optimizer.fp16_partitioned_groups_flat):
            flat.data.copy_(optimizer.fp32_partitioned_groups_flat[index].data)
            optimizer._unflatten_partitioned_parameters(index)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups_flat"):
        for flat, group in zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True):
            parts = flat.split([p.numel() for p in group])
            for parameter, part in zip(group, parts, strict=True):
                parameter.data.copy_(part.view(parameter.shape))
    elif hasattr(optimizer, "fp32_groups"):
        for masters, group in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for parameter, master in zip(group, masters, strict=True):
                parameter.data.copy_(master)


def _schedule(engine: Engine) -> Any:
    return engine.model.lr_scheduler


def _basic(optimizer: Any) -> Any:
    """Return the optimizer inside DeepSpeed's wrapper."""
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def _scaler(engine: Engine) -> Any:
    if engine.resolved.precision != "fp16":
        return None
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
