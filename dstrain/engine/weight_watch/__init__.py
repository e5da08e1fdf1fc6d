"""Detection of parameters that a user's code changes in place, or reads while partitioned."""

from dstrain.engine.weight_watch.changes import WeightChanges
from dstrain.engine.weight_watch.partitioned_reads import watching_partitioned_reads

__all__ = [
    "WeightChanges",
    "watching_partitioned_reads",
]
