"""Optimizers with their parameter groups and compiled ops, and schedules that need a metric."""

from dstrain.engine.optimizers.adagrad import make_adagrad_lazy, without_adagrad_replacement
from dstrain.engine.optimizers.factory import build_ops, optimizer_class, optimizer_factory
from dstrain.engine.optimizers.grouping import (
    decay_parameter_names,
    group_of,
    parameter_groups,
)
from dstrain.engine.optimizers.host_adam import correct_bias_by_step
from dstrain.engine.optimizers.metric_schedule import MetricSchedule, stepping_by_metric_only
from dstrain.engine.optimizers.muon import clip_before_muon
from dstrain.engine.optimizers.nvme import prepare_nvme
from dstrain.engine.optimizers.user_optimizer import check_user_optimizer, slices_remark

__all__ = [
    "MetricSchedule",
    "without_adagrad_replacement",
    "build_ops",
    "check_user_optimizer",
    "clip_before_muon",
    "correct_bias_by_step",
    "decay_parameter_names",
    "group_of",
    "stepping_by_metric_only",
    "make_adagrad_lazy",
    "optimizer_class",
    "optimizer_factory",
    "parameter_groups",
    "prepare_nvme",
    "slices_remark",
]
