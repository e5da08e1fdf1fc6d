"""Reading and restoring counters, loss scale, parameter groups and schedule of an engine."""

from __future__ import annotations

from typing import Any

import torch

from dstrain.core.errors import CheckpointError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import all_or_none
from dstrain.engine.buffers import Buffers
from dstrain.engine.state.optimizer_state import (
    check_number_of_groups,
    group_values,
    same_for_all,
    set_group_values,
)
from dstrain.engine.state.schedule import (
    STEERED,
    last_rates,
    restore_schedule,
    schedule_state,
    steps_done,
    unchanged_in_training,
)

logger = get_logger(__name__)

_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
# Attributes of DeepSpeed's DynamicLossScaler, and of LossScaleConfig at stage 0, which has no
# cur_hysteresis.
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class EngineProgress:
    """Counters, loss scale, parameter groups and schedule of a DeepSpeed engine.

    Attributes:
        initial: schedule and parameter groups before the first step, as the arguments of the run
            set them. Values that differ from these later have been changed by training.
    """

    def __init__(self, deepspeed_engine: Any, *, precision: str, buffers: Buffers) -> None:
        """Record the initial schedule and groups of an engine that has taken no step.

        Args:
            deepspeed_engine: the engine of DeepSpeed.
            precision: number format of the run.
            buffers: tracker of the model's buffers, of which only names are read and restored here.
        """
        self._engine, self._precision, self._buffers = deepspeed_engine, precision, buffers
        self.initial: dict[str, Any] = {
            "schedule": schedule_state(self._schedule),
            "groups": group_values(self._basic_optimizer),
        }

    @property
    def optimizer_name(self) -> str:
        """Return the class name of the optimizer inside DeepSpeed's wrapper."""
        return type(self._basic_optimizer).__name__

    def read(self) -> dict[str, Any]:
        """Return the state that is equal on all ranks, in the form of ``EngineRecord``.

        Raises:
            CheckpointError: the schedule has no ``state_dict``.
        """
        scaler, schedule = self._scaler, self._schedule
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
            "counters": {name: getattr(self._engine, name) for name in _COUNTERS},
            "loss_scale": None
            if scaler is None
            else {name: getattr(scaler, name) for name in _SCALE if hasattr(scaler, name)},
            "optimizer": self.optimizer_name,
            "groups": group_values(self._basic_optimizer),
            "schedule": state,
            "rates": last_rates(schedule),
            "begun": self.initial,
            "buffers": self._buffers.found(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Restore what ``read`` returned; a collective of all ranks.

        The loss scale is restored only if both runs use fp16; between a scaler without hysteresis
        (stage 0) and one with it (the other stages), the values that both have are restored. Of
        schedule and parameter groups, the values that training has changed are restored; values
        that come from arguments stay as this run's arguments set them.

        Raises:
            CheckpointError: the parameter groups differ, only one of the runs has a schedule, or
                this run's schedule cannot take the state; raised on every rank.
        """
        for name in _COUNTERS:
            setattr(self._engine, name, saved["counters"][name])
        if saved.get("buffers") is not None:  # not in older checkpoints, nor in imports
            self._buffers.adopt(saved["buffers"])
        scaler, scale = self._scaler, saved["loss_scale"] or {}
        for name in _SCALE:
            if scaler is not None and hasattr(scaler, name) and scale.get(name) is not None:
                setattr(scaler, name, scale[name])
        with all_or_none():
            self._restore_groups(saved)

    def _restore_groups(self, saved: dict[str, Any]) -> None:
        """Restore parameter groups and schedule from what ``read`` returned.

        Raises:
            CheckpointError: as ``restore``; on this rank.
        """
        schedule, optimizer = self._schedule, self._basic_optimizer
        if (schedule is None) != (saved["schedule"] is None):
            there, here = ("a", "none") if schedule is None else ("no", "one")
            raise CheckpointError(
                Problem(
                    f"the checkpoint has {there} learning-rate schedule, this run has {here}",
                    "",
                    "use the schedule of the run that wrote it",
                )
            )
        check_number_of_groups(len(optimizer.param_groups), saved["groups"])
        # Loading DeepSpeed's own layout has set the groups to the checkpoint's: set them back.
        fresh = [{k: v for k, v in g.items() if k in STEERED} for g in self.initial["groups"]]
        set_group_values(optimizer, fresh)
        groups = optimizer.param_groups
        placed = () if schedule is None else self._restore_schedule(saved)
        instead = _values_of_this_run(groups, placed, saved, self.initial["groups"])
        set_group_values(optimizer, saved["groups"], instead=instead)

    def _restore_schedule(self, saved: dict[str, Any]) -> tuple[str, ...]:
        """Set the schedule to the step of the saved run.

        Returns:
            the entries of parameter groups that the schedule has set, and that must not be
            restored.
        """
        schedule, groups = self._schedule, self._basic_optimizer.param_groups
        count = len(groups)
        begun = saved.get("begun")  # older checkpoints and imported ones have none
        if begun is not None and begun["schedule"] is not None:
            begun = {**begun, "schedule": _for_groups(begun["schedule"], begun["groups"], count)}
        rates = saved.get("rates") or [group["lr"] for group in saved["groups"]]
        rates = _for_groups({"rates": rates}, saved["groups"], count)["rates"]
        try:
            placed = restore_schedule(
                schedule,
                groups,
                {"state": _for_groups(saved["schedule"], saved["groups"], count), "rates": rates},
                begun=begun,
                fresh=self.initial,
                num_steps=steps_done(saved),
            )
        except CheckpointError:
            raise
        except Exception as error:  # a user's schedule class can raise anything
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
                "this run's schedule of learning rates is not the checkpoint's: the rate of the "
                "next step is %g, the checkpoint's schedule had %g",
                groups[0]["lr"],
                rates[0],
            )
        return placed

    @property
    def _schedule(self) -> Any:
        """Return the learning-rate schedule of the engine, or None."""
        return self._engine.lr_scheduler

    @property
    def _basic_optimizer(self) -> Any:
        """Return the optimizer inside DeepSpeed's wrapper."""
        wrapper = self._engine.optimizer
        return wrapper if isinstance(wrapper, torch.optim.Optimizer) else wrapper.optimizer

    @property
    def _scaler(self) -> Any:
        """Return the object that has the loss scale; None without fp16."""
        if self._precision != "fp16":
            return None
        wrapper = self._engine.optimizer
        return getattr(wrapper, "loss_scaler", None) or getattr(wrapper, "loss_scale_config", None)


def _values_of_this_run(
    groups: list[dict[str, Any]],
    placed: tuple[str, ...],
    saved: dict[str, Any],
    initial: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return the values of this run that must not be replaced by saved ones, for each group.

    These are entries that the schedule has set, and entries that come from arguments: their saved
    value is the same as before the saved run's first step. A learning rate that a schedule sets is
    never taken for an argument, since a schedule may return to its first rate.

    Args:
        groups: parameter groups of this run's optimizer.
        placed: the entries that the schedule has set.
        saved: what ``EngineProgress.read`` returned in the saved run.
        initial: values of this run's groups before its first step.
    """
    count = len(groups)
    there, begun = (
        _aligned(values, count)
        for values in (saved["groups"], (saved.get("begun") or {}).get("groups"))
    )
    found = [{name: group[name] for name in placed if name in group} for group in groups]
    if there is None or begun is None:
        return found
    steered = () if saved["schedule"] is None else ("lr",)
    for kept, values, before, now in zip(found, there, begun, initial, strict=True):
        for name in values.keys() & before.keys() & now.keys() - {*placed, *steered}:
            if unchanged_in_training(values[name], before[name]):
                kept[name] = now[name]
    return found


def _aligned(values: list[dict[str, Any]] | None, count: int) -> list[dict[str, Any]] | None:
    """Return values for ``count`` groups; None unless there are as many, or all are equal."""
    if values and len(values) != count and same_for_all(values):
        return values[:1] * count
    return values if values is not None and len(values) == count else None


def _for_groups(state: Any, saved: list[dict[str, Any]], count: int) -> Any:
    """Return a schedule's state, fitted to another number of groups if the saved ones are equal.

    torch's schedules keep lists with a rate per group; these get the length ``count``.

    Args:
        state: the saved state of the schedule.
        saved: values of the saved groups.
        count: number of groups of this run.
    """
    if state is None or len(saved) == count or not saved or not same_for_all(saved):
        return state
    fitted = dict(state)
    for key, value in state.items():
        if isinstance(value, list) and len(value) == len(saved):
            fitted[key] = value[:1] * count
    return fitted
