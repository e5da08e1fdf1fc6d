"""Comparison of the samples that ranks read: the same, the same with noise, or different ones."""

from dstrain.data.comparison.stream_watch import StreamWatch
from dstrain.data.comparison.summaries import (
    ALIKE,
    DIFFERENT,
    MOST_SAMPLES,
    UNCLEAR,
    Verdict,
    compare,
)

__all__ = [
    "ALIKE",
    "DIFFERENT",
    "MOST_SAMPLES",
    "StreamWatch",
    "UNCLEAR",
    "Verdict",
    "compare",
]
