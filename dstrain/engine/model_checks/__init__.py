"""Checks of a model before an engine is built: number formats, leaf modules and LayerDrop."""

from dstrain.engine.model_checks.layerdrop import check_layerdrop
from dstrain.engine.model_checks.leaf_modules import (
    check_leaf_modules,
    expert_blocks,
    leaf_remark,
)
from dstrain.engine.model_checks.number_formats import (
    check_formats,
    formats_remark,
    make_contiguous,
)

__all__ = [
    "check_formats",
    "check_layerdrop",
    "check_leaf_modules",
    "expert_blocks",
    "formats_remark",
    "leaf_remark",
    "make_contiguous",
]
