"""Optimizers, their parameter groups and compiled ops, and schedules that need a metric."""

from dstrain.engine.optimizers.factory import (
    adagrad_stays,
    build_ops,
    check_own,
    group_of,
    keep_adagrad,
    optimizer_class,
    optimizer_factory,
    slices_remark,
)
from dstrain.engine.optimizers.host_adam import correct_bias_by_step
from dstrain.engine.optimizers.metric_schedule import MetricSchedule, guarded
from dstrain.engine.optimizers.nvme import prepare_nvme
from dstrain.engine.optimizers.parameter_groups import decay_parameter_names, parameter_groups

__all__ = [
    "MetricSchedule",
    "adagrad_stays",
    "build_ops",
    "check_own",
    "correct_bias_by_step",
    "decay_parameter_names",
    "group_of",
    "guarded",
    "keep_adagrad",
    "optimizer_class",
    "optimizer_factory",
    "parameter_groups",
    "prepare_nvme",
    "slices_remark",
]
