"""Schedules whose step needs the metric of an evaluation."""

from __future__ import annotations

import inspect
from typing import Any


class MetricSchedule:
    """A wrapper for a schedule that DeepSpeed must not step after every optimizer step.

    DeepSpeed 0.19.8 calls ``step()``, and where that needs an argument ``step(train_batch_size)``
    (engine.py, ``_take_model_step``): the batch size would pass for the metric. All other
    attributes are those of the schedule.
    """

    def __init__(self, schedule: Any) -> None:
        """Wrap a schedule."""
        self.schedule = schedule

    def step(self, metric: float | None = None, **kwargs: Any) -> None:
        """Step by a metric; without one do nothing."""
        if metric is not None:
            self.schedule.step(metric, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the schedule: its rates, its state, ..."""
        return getattr(self.schedule, name)


def stepping_by_metric_only(schedule: Any) -> Any:
    """Return a schedule, or a function that makes one, in a form that an engine can step."""
    if schedule is None:
        return None
    if callable(schedule):
        return lambda optimizer: stepping_by_metric_only(schedule(optimizer))
    return MetricSchedule(schedule) if _needs_metric(schedule) else schedule


def _needs_metric(schedule: Any) -> bool:
    """Tell whether ``step`` has an argument that must be given."""
    if isinstance(schedule, MetricSchedule) or not hasattr(schedule, "step"):
        return False
    try:
        parameters = inspect.signature(schedule.step).parameters.values()
    except (TypeError, ValueError):
        return False
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in plain and p.default is inspect.Parameter.empty for p in parameters)
