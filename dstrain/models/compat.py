"""The semi-private parts of transformers and its hub that this room uses, in one place."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange

__all__ = ["PrefixChange", "StrictDataclassError", "save_conversions"]


def save_conversions(module: Any) -> list[Any]:
    """What ``save_pretrained`` would do to the layout of this model's weights.

    The rule of ``revert_weight_conversion``: the conversions of loading, or, for a model built from
    a config, the architecture's own without changes of prefix.
    """
    conversions = getattr(module, "_weight_conversions", None)
    if conversions is None:
        mapping = get_model_conversion_mapping(module, add_legacy=False)
        conversions = [c for c in mapping if not isinstance(c, PrefixChange)]
    return list(conversions)
