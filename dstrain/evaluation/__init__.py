"""Exact evaluation."""

from dstrain.evaluation.loop import EvalBatch, LossTotals, evaluate_loss

__all__ = ["EvalBatch", "LossTotals", "evaluate_loss"]
