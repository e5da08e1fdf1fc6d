"""State of an engine that trains: master weights, moments, counters, loss scale and schedule."""

from dstrain.engine.state.layouts import locate_shards
from dstrain.engine.state.native import Unpickling
from dstrain.engine.state.optimizer_state import changing_values, read_scalars
from dstrain.engine.state.record import EngineRecord
from dstrain.engine.state.shards import (
    MASTER,
    WEIGHT,
    StateShard,
    shards_to_write,
)
from dstrain.engine.state.training_state import CapturedState, TrainingState

__all__ = [
    "MASTER",
    "WEIGHT",
    "CapturedState",
    "EngineRecord",
    "StateShard",
    "TrainingState",
    "Unpickling",
    "changing_values",
    "locate_shards",
    "read_scalars",
    "shards_to_write",
]
