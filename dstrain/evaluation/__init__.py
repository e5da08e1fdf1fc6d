"""Exact evaluation: the loop, predictions on rank 0, metrics computed once; which one was best."""

from dstrain.evaluation.best import BestRule
from dstrain.evaluation.collect import Collected, Collector, Keeping
from dstrain.evaluation.loop import EvalBatch, LossTotals, Prediction, evaluate_batches
from dstrain.evaluation.metrics import BatchMetric, metric_values, with_prefix
from dstrain.evaluation.transport import Transport

__all__ = [
    "BatchMetric",
    "BestRule",
    "Collected",
    "Collector",
    "EvalBatch",
    "Keeping",
    "LossTotals",
    "Prediction",
    "Transport",
    "evaluate_batches",
    "metric_values",
    "with_prefix",
]
