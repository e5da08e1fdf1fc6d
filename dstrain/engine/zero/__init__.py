"""Partitioned parameters of ZeRO stage 3; removal of DeepSpeed's changes to modules and torch."""

from dstrain.engine.zero import process_settings
from dstrain.engine.zero.cleanup import (
    detach_engine,
    forget_running_modules,
    make_whole,
    marked_leaves,
)
from dstrain.engine.zero.generation import generating_together
from dstrain.engine.zero.parameters import (
    bytes_to_gather,
    check_sizes,
    full_numel,
    full_shape,
    gathered,
    gathers_in_forward,
    has_scalars,
    is_absent,
    is_gathered,
    is_on_disk,
    is_partitioned,
    keep_persistent_changes,
    kept_gathered,
    may_show_partitions,
    model_facts,
    rank_partition,
    showing_partitions,
    updated_rank_partition,
)
from dstrain.engine.zero.partitioner import (
    Partitioner,
    building_whole_models,
    fill_with_placeholder,
    is_whole,
    with_full_shapes,
)
from dstrain.engine.zero.registration import (
    BuildRegistration,
    ForwardRegistration,
    StageRegistration,
)
from dstrain.engine.zero.scalar_parameters import clip_scalars_too, scalars_as_bytes
from dstrain.engine.zero.swap_folders import SwapFolder
from dstrain.engine.zero.torch_patches import MemoryEfficientLinear, undo_patches

__all__ = [
    "MemoryEfficientLinear",
    "Partitioner",
    "SwapFolder",
    "StageRegistration",
    "ForwardRegistration",
    "BuildRegistration",
    "building_whole_models",
    "bytes_to_gather",
    "check_sizes",
    "clip_scalars_too",
    "forget_running_modules",
    "full_numel",
    "full_shape",
    "gathered",
    "has_scalars",
    "generating_together",
    "is_absent",
    "is_partitioned",
    "may_show_partitions",
    "is_whole",
    "is_gathered",
    "is_on_disk",
    "keep_persistent_changes",
    "kept_gathered",
    "marked_leaves",
    "make_whole",
    "model_facts",
    "rank_partition",
    "process_settings",
    "gathers_in_forward",
    "scalars_as_bytes",
    "showing_partitions",
    "fill_with_placeholder",
    "undo_patches",
    "detach_engine",
    "updated_rank_partition",
    "with_full_shapes",
]
