"""Inference of the denominator of a model's mean loss, by watching its first forward passes."""

from dstrain.data.loss.rule import (
    IGNORED,
    Denominator,
    LossFindings,
    LossRule,
)
from dstrain.data.loss.targets import LossTargets, no_targets

__all__ = [
    "Denominator",
    "IGNORED",
    "LossFindings",
    "LossRule",
    "LossTargets",
    "no_targets",
]
