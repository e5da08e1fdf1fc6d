"""One door to what a training has made: master weights, moments, counters, loss scale, schedule."""

from dstrain.engine.state.capture import Carried, carry, put_down
from dstrain.engine.state.native import Unpickling, load_native, save_native
from dstrain.engine.state.optimizer_state import changing_values, create_state, read_scalars
from dstrain.engine.state.progress import (
    begin_load,
    finish_load,
    read_begun,
    read_progress,
    write_progress,
)
from dstrain.engine.state.record import EngineRecord
from dstrain.engine.state.shards import MASTER, WEIGHT, Region, optimized_names, regions, share

__all__ = [
    "Carried",
    "EngineRecord",
    "MASTER",
    "Region",
    "Unpickling",
    "WEIGHT",
    "begin_load",
    "carry",
    "changing_values",
    "create_state",
    "finish_load",
    "load_native",
    "optimized_names",
    "put_down",
    "read_begun",
    "read_progress",
    "read_scalars",
    "regions",
    "save_native",
    "share",
    "write_progress",
]
