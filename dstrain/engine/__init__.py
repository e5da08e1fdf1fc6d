"""The only room that imports deepspeed: start-up, engine, ZeRO contexts."""

from dstrain.engine.engine import Engine, StepOutcome, inference_engine
from dstrain.engine.groups import decay_parameter_names, parameter_groups
from dstrain.engine.leaf import expert_blocks
from dstrain.engine.machine import least, read_machine
from dstrain.engine.nvme import prepare_nvme
from dstrain.engine.optimizers import build_ops, check_own, optimizer_class, slices_remark
from dstrain.engine.startup import (
    check_precision,
    device_name,
    device_type,
    shut_down,
    start,
)
from dstrain.engine.zero import (
    ZeroThreeMark,
    full_numel,
    full_shape,
    gathered,
    is_partitioned,
    model_facts,
)

__all__ = [
    "Engine",
    "StepOutcome",
    "ZeroThreeMark",
    "build_ops",
    "check_own",
    "check_precision",
    "decay_parameter_names",
    "device_name",
    "device_type",
    "expert_blocks",
    "full_numel",
    "full_shape",
    "gathered",
    "inference_engine",
    "is_partitioned",
    "least",
    "model_facts",
    "optimizer_class",
    "parameter_groups",
    "read_machine",
    "prepare_nvme",
    "shut_down",
    "slices_remark",
    "start",
]
