"""Inference of the denominator of a model's mean loss, by watching its first forward passes."""

from dstrain.data.loss.rule import (
    IGNORED,
    SHIFTED_LABELS,
    Candidate,
    Denominator,
    LossFindings,
    LossRule,
    expected_rule,
)
from dstrain.data.loss.targets import LossTargets, no_targets

__all__ = [
    "Candidate",
    "Denominator",
    "IGNORED",
    "LossFindings",
    "LossRule",
    "LossTargets",
    "SHIFTED_LABELS",
    "expected_rule",
    "no_targets",
]
