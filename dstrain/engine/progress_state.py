"""What an engine knows beside tensors: counters, loss scale, rates of the groups, the schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dstrain.core.errors import CheckpointError, Problem
from dstrain.engine.optimizer_state import group_values, same_for_all, set_group_values

if TYPE_CHECKING:
    from dstrain.engine.engine import Engine

_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
# Of DeepSpeed's DynamicLossScaler, and of LossScaleConfig at stage 0, which lacks the last.
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read_progress(engine: Engine) -> dict[str, Any]:
    """Plain values of an engine that do not depend on the rank.

    Raises:
        CheckpointError: a schedule without ``state_dict``.
    """
    scaler = _scaler(engine)
    return {
        "counters": {name: getattr(engine.model, name) for name in _COUNTERS},
        "loss_scale": None
        if scaler is None
        else {name: getattr(scaler, name) for name in _SCALE if hasattr(scaler, name)},
        "optimizer": type(_basic(engine.optimizer)).__name__,
        "groups": group_values(_basic(engine.optimizer)),
        "schedule": _schedule(engine).state_dict() if _schedule(engine) is not None else None,
        "buffers": engine.buffers.found(),
    }


def write_progress(engine: Engine, saved: dict[str, Any]) -> None:
    """Put back what ``read_progress`` gave; a collective of all ranks.

    The loss scale is left alone unless both runs use fp16; a scaler without hysteresis (stage 0)
    and one with it (the other stages) take from each other what both have.

    Raises:
        CheckpointError: other parameter groups, or a schedule where there was none.
    """
    for name, value in saved["counters"].items():
        setattr(engine.model, name, value)
    if "buffers" in saved:  # not in older checkpoints, nor in imports
        engine.buffers.take_up(saved["buffers"])
    scaler = _scaler(engine)
    for name, value in (saved["loss_scale"] or {}).items():
        if scaler is not None and hasattr(scaler, name):
            setattr(scaler, name, value)
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
    if schedule is not None:
        count = len(_basic(engine.optimizer).param_groups)
        schedule.load_state_dict(_for_groups(saved["schedule"], saved["groups"], count))
    set_group_values(_basic(engine.optimizer), saved["groups"])


def _for_groups(state: dict[str, Any], saved: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """A schedule's state for another number of parameter groups, where the saved ones were alike.

    torch keeps a rate per group in lists, and a list too short would leave groups without one.
    """
    if len(saved) == count or not saved or not same_for_all(saved):
        return state
    fitted = dict(state)
    for key, value in state.items():
        if isinstance(value, list) and len(value) == len(saved):
            fitted[key] = value[:1] * count
    return fitted


def begin_load(engine: Engine) -> None:
    """Before regions are written: let go of gathered parameters of stage 3, which would be stale.

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
    """The optimizer below DeepSpeed's wrapper."""
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def _scaler(engine: Engine) -> Any:
    if engine.resolved.precision != "fp16":
        return None
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
