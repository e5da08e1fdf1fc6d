"""The only room that imports deepspeed: start-up, engine, ZeRO contexts."""

from dstrain.engine.alive import engine_on, in_use, let_orphans_go, make_way
from dstrain.engine.buffers import Buffers, checksum, main_ranks_buffers
from dstrain.engine.carry import Carried, carry, put_down
from dstrain.engine.engine import Engine, StepOutcome, inference_engine
from dstrain.engine.formats import check_formats, formats_remark
from dstrain.engine.groups import decay_parameter_names, parameter_groups
from dstrain.engine.in_step import in_step
from dstrain.engine.leaf import expert_blocks, leaf_remark
from dstrain.engine.machine import free_memory_bytes, least, read_machine
from dstrain.engine.metric_schedule import MetricSchedule
from dstrain.engine.native import Unpickling, load_native, save_native
from dstrain.engine.nvme import prepare_nvme
from dstrain.engine.optimizer_state import changing_values, create_state, read_scalars
from dstrain.engine.optimizers import build_ops, check_own, optimizer_class, slices_remark
from dstrain.engine.partition import (
    Partitioner,
    built_whole,
    is_whole,
    stand_in,
    with_full_shapes,
)
from dstrain.engine.progress_record import EngineRecord
from dstrain.engine.progress_state import begin_load, finish_load, read_progress, write_progress
from dstrain.engine.regions import MASTER, WEIGHT, Region, optimized_names, regions, share
from dstrain.engine.registration import StageTold, ZeroThreeMark
from dstrain.engine.regroup import Regroup, is_out_of_memory
from dstrain.engine.scalars import scalars_as_bytes
from dstrain.engine.shared_memory import forget_own as forget_shared_memory
from dstrain.engine.slots import Slot, empty_slots_of, slots_of
from dstrain.engine.startup import (
    check_precision,
    check_versions,
    device_name,
    device_type,
    empty_cache,
    shut_down,
    start,
)
from dstrain.engine.traces import make_whole
from dstrain.engine.zero import (
    bytes_to_gather,
    check_sizes,
    full_numel,
    full_shape,
    gathered,
    is_partitioned,
    is_shown_in_parts,
    kept_whole,
    model_facts,
    own_partition,
    puts_together,
)

__all__ = [
    "forget_shared_memory",
    "check_sizes",
    "MASTER",
    "WEIGHT",
    "Buffers",
    "Carried",
    "Engine",
    "EngineRecord",
    "MetricSchedule",
    "Partitioner",
    "Region",
    "Regroup",
    "Slot",
    "StageTold",
    "StepOutcome",
    "Unpickling",
    "ZeroThreeMark",
    "begin_load",
    "build_ops",
    "built_whole",
    "check_versions",
    "bytes_to_gather",
    "carry",
    "changing_values",
    "check_formats",
    "check_own",
    "checksum",
    "check_precision",
    "create_state",
    "decay_parameter_names",
    "device_name",
    "device_type",
    "empty_cache",
    "empty_slots_of",
    "engine_on",
    "expert_blocks",
    "finish_load",
    "formats_remark",
    "free_memory_bytes",
    "full_numel",
    "full_shape",
    "gathered",
    "in_step",
    "in_use",
    "inference_engine",
    "is_out_of_memory",
    "is_partitioned",
    "is_shown_in_parts",
    "is_whole",
    "kept_whole",
    "leaf_remark",
    "least",
    "let_orphans_go",
    "load_native",
    "main_ranks_buffers",
    "make_way",
    "make_whole",
    "model_facts",
    "optimized_names",
    "optimizer_class",
    "own_partition",
    "parameter_groups",
    "prepare_nvme",
    "put_down",
    "puts_together",
    "read_machine",
    "read_progress",
    "read_scalars",
    "regions",
    "save_native",
    "scalars_as_bytes",
    "share",
    "shut_down",
    "slices_remark",
    "slots_of",
    "stand_in",
    "start",
    "with_full_shapes",
    "write_progress",
]
