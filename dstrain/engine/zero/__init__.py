"""Partitioned parameters of ZeRO stage 3, and what DeepSpeed leaves behind in modules and torch."""

from dstrain.engine.zero import process_settings
from dstrain.engine.zero.cleanup import forget_modules, leaves_of, make_whole, untie
from dstrain.engine.zero.generation import in_step
from dstrain.engine.zero.parameters import (
    bytes_to_gather,
    check_sizes,
    full_numel,
    full_shape,
    gathered,
    has_scalars,
    is_away,
    is_partitioned,
    is_shown_in_parts,
    is_whole_now,
    keep_whole,
    kept_whole,
    model_facts,
    own_partition,
    puts_together,
    shown_in_parts,
    updated_share,
)
from dstrain.engine.zero.partitioner import (
    Partitioner,
    built_whole,
    is_whole,
    stand_in,
    with_full_shapes,
)
from dstrain.engine.zero.registration import (
    MemoryEfficientLinear,
    StageTold,
    ToldInForward,
    ZeroThreeMark,
    undo_patches,
)
from dstrain.engine.zero.scalar_parameters import clip_scalars_too, scalars_as_bytes

__all__ = [
    "MemoryEfficientLinear",
    "Partitioner",
    "StageTold",
    "ToldInForward",
    "ZeroThreeMark",
    "built_whole",
    "bytes_to_gather",
    "check_sizes",
    "clip_scalars_too",
    "forget_modules",
    "full_numel",
    "full_shape",
    "gathered",
    "has_scalars",
    "in_step",
    "is_away",
    "is_partitioned",
    "is_shown_in_parts",
    "is_whole",
    "is_whole_now",
    "keep_whole",
    "kept_whole",
    "leaves_of",
    "make_whole",
    "model_facts",
    "own_partition",
    "process_settings",
    "puts_together",
    "scalars_as_bytes",
    "shown_in_parts",
    "stand_in",
    "undo_patches",
    "untie",
    "updated_share",
    "with_full_shapes",
]
