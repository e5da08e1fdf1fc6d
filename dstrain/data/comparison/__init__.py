"""Comparing what ranks read: the same samples, noisy copies of them, or other samples."""

from dstrain.data.comparison.looks import ALIKE, DIFFERENT, MOST_SAMPLES, UNCLEAR, Verdict, compare
from dstrain.data.comparison.stream_watch import StreamWatch

__all__ = [
    "ALIKE",
    "DIFFERENT",
    "MOST_SAMPLES",
    "StreamWatch",
    "UNCLEAR",
    "Verdict",
    "compare",
]
