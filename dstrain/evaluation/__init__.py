"""Exact evaluation: the loop, predictions on rank 0, metrics computed once, the best result."""

from dstrain.evaluation.best import BestRule
from dstrain.evaluation.collect import Collected, Collector, PredictionOptions
from dstrain.evaluation.loop import EvalBatch, LossTotals, Prediction, evaluate_batches
from dstrain.evaluation.metrics import BatchMetric, metric_values, with_prefix
from dstrain.evaluation.transport import Transport

__all__ = [
    "BatchMetric",
    "BestRule",
    "Collected",
    "Collector",
    "EvalBatch",
    "PredictionOptions",
    "LossTotals",
    "Prediction",
    "Transport",
    "evaluate_batches",
    "metric_values",
    "with_prefix",
]
