"""Schedules that follow a metric, which an engine must not step with anything else."""

from __future__ import annotations

import math

import torch

from dstrain.engine.optimizers.metric_schedule import MetricSchedule, stepping_by_metric_only


def test_an_engine_cannot_step_a_schedule_with_something_that_is_no_metric():
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    schedule = stepping_by_metric_only(lambda basic: plateau)(optimizer)
    assert isinstance(schedule, MetricSchedule)
    for _ in range(5):
        schedule.step()
    assert schedule.state_dict()["best"] == math.inf
    schedule.step(1.0)
    schedule.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.5
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer)
    assert stepping_by_metric_only(constant) is constant
    assert stepping_by_metric_only(None) is None
