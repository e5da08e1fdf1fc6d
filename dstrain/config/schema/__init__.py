"""Schema: the keys of DeepSpeed as data, and the check of a config against them."""

from dstrain.config.schema.check import (
    AUTO,
    auto_is_a_value,
    check,
    default_of,
    is_known,
    known_paths,
    normalise,
    read_text,
)
from dstrain.config.schema.entry import NO_DEFAULT

__all__ = [
    "AUTO",
    "NO_DEFAULT",
    "auto_is_a_value",
    "check",
    "default_of",
    "is_known",
    "known_paths",
    "normalise",
    "read_text",
]
