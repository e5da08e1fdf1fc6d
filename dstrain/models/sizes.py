"""Sizes of a module, of one that exists or of one built without memory, for the memory plan."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch

from dstrain.config.parameters import Block, ModelSizes, Tensors, merged
from dstrain.engine import full_shape

_LAYER = re.compile(r"\.\d+\.")
_GATES = ("gate_proj", "gate_up_proj", "wi_0", "w1.")


def count_causal_lm(config: Any) -> ModelSizes:
    """Sizes of the causal language model of a config, before it is built with memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return sizes_of_module(module, source="built without memory")


def sizes_of_module(module: torch.nn.Module, *, source: str = "the model") -> ModelSizes:
    """Sizes of a module that exists, on any device, whole or partitioned.

    The form of its layers is read from a transformers config; a plain module has none.
    """
    named = list(module.named_parameters())
    tensors = [Tensors(_part(name), full_shape(p), 1, p.requires_grad) for name, p in named]
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    return ModelSizes(
        getattr(config, "model_type", "") or type(module).__name__,
        source,
        merged(tensors),
        int(getattr(text, "vocab_size", 0) or 0),
        None if text is None else _block(text, [name for name, _ in named]),
    )


def _part(name: str) -> str:
    if _LAYER.search(name):
        return "layer"
    if "embed" in name or name.endswith(("wte.weight", "wpe.weight", "shared.weight")):
        return "embedding"
    return "head" if "head" in name else "other"


def _block(config: Any, names: list[str]) -> Block | None:
    """The form of a layer as far as usual names tell it."""
    hidden, heads = _first(config, "hidden_size", "d_model"), _first(config, "num_attention_heads")
    layers = _first(config, "num_hidden_layers", "num_layers", "n_layer")
    if not (hidden and heads and layers):
        return None
    decoder = (_first(config, "num_decoder_layers", "decoder_layers") or layers) * bool(
        getattr(config, "is_encoder_decoder", False)
    )
    ffn = _first(config, "intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim")
    experts = _first(config, "num_experts_per_tok") or 1
    if experts > 1:
        ffn = _first(config, "moe_intermediate_size") or ffn
    return Block(
        layers + decoder,
        hidden,
        heads,
        _first(config, "num_key_value_heads") or heads,
        _first(config, "head_dim") or hidden // heads,
        ffn or 4 * hidden,
        gated=any(gate in name for gate in _GATES for name in names),
        rms_norm=hasattr(config, "rms_norm_eps"),
        norms=max(2, _norms_per_layer(names)),
        experts_per_token=experts,
        cross_layers=decoder,
    )


def _norms_per_layer(names: list[str]) -> int:
    first = [n for n in names if ".0." in n and n.endswith(("norm.weight", "layernorm.weight"))]
    return len(
        [n for n in first if "q_norm" not in n and "k_norm" not in n and n.count(".0.") == 1]
    )


def _first(config: Any, *names: str) -> int:
    values = (getattr(config, name, None) for name in names)
    return next((int(v) for v in values if isinstance(v, int) and v > 0), 0)
