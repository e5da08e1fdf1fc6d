"""Comparing what ranks read: the same samples, noisy copies of them, or other samples."""

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
