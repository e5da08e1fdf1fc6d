"""Semi-private parts of transformers that ``dstrain.data`` uses, in one place."""

from __future__ import annotations


def causal_lm_names() -> frozenset[str]:
    """Return the names of transformers' causal language models, without importing them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return frozenset(name for name in NAMES.values() if isinstance(name, str))
