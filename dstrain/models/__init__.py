"""Models: built, loaded and saved whole or partitioned."""

from dstrain.models.build import (
    DTYPES,
    build_causal_lm,
    check_model_folder,
    load_causal_lm,
    max_length,
    parse_model_config,
)
from dstrain.models.save import check_writable, save_model
from dstrain.models.sizes import count_causal_lm, sizes_of_module

__all__ = [
    "DTYPES",
    "build_causal_lm",
    "check_model_folder",
    "check_writable",
    "count_causal_lm",
    "load_causal_lm",
    "max_length",
    "parse_model_config",
    "save_model",
    "sizes_of_module",
]
