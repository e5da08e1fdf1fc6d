"""Watches over parameters that a user's code changes, or reads while they are partitioned."""

from dstrain.engine.weight_watch.changes import WeightChanges
from dstrain.engine.weight_watch.partitioned_reads import watching_partitioned_reads

__all__ = [
    "WeightChanges",
    "watching_partitioned_reads",
]
