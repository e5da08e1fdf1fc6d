"""Learning-rate schedules that step by the metric of an evaluation."""

from __future__ import annotations

import inspect
from typing import Any


class MetricSchedule:
    """A wrapper of a schedule that ignores DeepSpeed's call of ``step`` after each optimizer step.

    DeepSpeed 0.19.8 calls ``step()`` or, if that needs an argument, ``step(train_batch_size)``
    (engine.py, ``_take_model_step``), so that the batch size would be taken for the metric. All
    other attributes are those of the schedule.
    """

    def __init__(self, schedule: Any) -> None:
        """Wrap a schedule."""
        self.schedule = schedule

    def step(self, metric: float | None = None, **kwargs: Any) -> None:
        """Step the schedule by a metric; do nothing without one."""
        if metric is not None:
            self.schedule.step(metric, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped schedule."""
        return getattr(self.schedule, name)


def stepping_by_metric_only(schedule: Any) -> Any:
    """Wrap a schedule that needs a metric, or a function that makes a schedule, for an engine.

    Args:
        schedule: a schedule, a function from optimizer to schedule, or None.

    Returns:
        the argument itself where nothing needs to be wrapped.
    """
    if schedule is None:
        return None
    if callable(schedule):
        return lambda optimizer: stepping_by_metric_only(schedule(optimizer))
    return MetricSchedule(schedule) if _needs_metric(schedule) else schedule


def _needs_metric(schedule: Any) -> bool:
    """Tell whether ``step`` of a schedule has a positional argument without a default."""
    if isinstance(schedule, MetricSchedule) or not hasattr(schedule, "step"):
        return False
    try:
        parameters = inspect.signature(schedule.step).parameters.values()
    except (TypeError, ValueError):
        return False
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in plain and p.default is inspect.Parameter.empty for p in parameters)
