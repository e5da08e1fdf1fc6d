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

__all__ = [
    "DTYPES",
    "build_causal_lm",
    "check_model_folder",
    "check_writable",
    "load_causal_lm",
    "max_length",
    "parse_model_config",
    "save_model",
]
