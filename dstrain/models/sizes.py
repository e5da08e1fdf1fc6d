"""Measurement of the sizes of modules for the memory plan."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import torch

from dstrain.config.memory.closed_forms import closed_form
from dstrain.config.memory.sizes import Block, ModelSizes, Tensors, merged
from dstrain.engine import full_shape
from dstrain.models.folder import library_errors

_LAYER = re.compile(r"\.\d+\.")
_NORM = re.compile(r"(?<![qk]_)(norm|norm_?\d|ln_\w+|layernorm)\.weight$", re.IGNORECASE)
_GATES = ("gate_proj", "gate_up_proj", "wi_0", "w1.")


def count_causal_lm(config: Any) -> ModelSizes:
    """Return the sizes of a config's causal language model, by building it without memory."""
    from transformers import AutoModelForCausalLM

    return _count(AutoModelForCausalLM, config)


def count_seq2seq(config: Any) -> ModelSizes:
    """Return the sizes of a config's sequence-to-sequence model, by building it without memory."""
    from transformers import AutoModelForSeq2SeqLM

    return _count(AutoModelForSeq2SeqLM, config)


def _count(auto: Any, config: Any) -> ModelSizes:
    """Return the sizes of the model that an auto class builds from a config."""
    what = f"no {config.model_type} model can be built from its config"
    with library_errors(what), torch.device("meta"):
        module = auto.from_config(copy.deepcopy(config))
    return sizes_of_module(module, source="built without memory")


def sizes_of_module(module: torch.nn.Module, *, source: str = "the model") -> ModelSizes:
    """Return the sizes of a module on any device, whole or partitioned.

    The dimensions of its layers come from its transformers config, if it has one.

    Args:
        module: the module.
        source: where the sizes come from, for messages.
    """
    named = list(module.named_parameters())
    tensors = [Tensors(_part(name), full_shape(p), 1, p.requires_grad) for name, p in named]
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    found = ModelSizes(
        getattr(config, "model_type", "") or type(module).__name__,
        source,
        merged(tensors),
        int(getattr(text, "vocab_size", 0) or 0),
        None if text is None else _block(text, [name for name, _ in named]),
        text_only=text is not None and text is not config,
    )
    # A closed form describes a layer more exactly than the names of parameters do.
    formula = closed_form(config.to_dict()) if hasattr(config, "to_dict") else None
    if formula is not None and formula.facts.num_parameters == found.facts.num_parameters:
        return replace(found, block=formula.block)
    return found


def _part(name: str) -> str:
    """Return the part of a model to which a parameter belongs, judging by its name."""
    if _LAYER.search(name):
        return "layer"
    if "embed" in name or name.endswith(("wte.weight", "wpe.weight", "shared.weight")):
        return "embedding"
    return "head" if "head" in name else "other"


def _block(config: Any, names: list[str]) -> Block | None:
    """Return the dimensions of a layer, as far as usual names in config and model show them.

    Args:
        config: config of the text model.
        names: names of all parameters.

    Returns:
        None if width, heads or number of layers are not known.
    """
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
    stacks = _first_norms(names)
    norms = [name for stack in stacks.values() for name in stack]
    # A decoder layer's third norm belongs to its cross attention.
    counts = sorted(map(len, stacks.values())) or [0]
    return Block(
        layers + decoder,
        hidden,
        heads,
        _first(config, "num_key_value_heads") or heads,
        _first(config, "head_dim") or hidden // heads,
        ffn or 4 * hidden,
        gated=any(gate in name for gate in _GATES for name in names),
        rms_norm=hasattr(config, "rms_norm_eps")
        or any(n[:-6] + "bias" not in names for n in norms),
        norms=max(2, counts[0] if decoder else counts[-1]),
        qk_norm=any("q_norm" in name for name in names),
        experts_per_token=experts,
        cross_layers=decoder,
    )


def _first_norms(names: list[str]) -> dict[str, list[str]]:
    """Return the names of norms in the first layer of each stack of layers, by stack.

    Leaves out norms of queries and keys.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        stack, zero, rest = name.partition(".0.")
        if zero and not re.search(r"\d", stack) and _NORM.search(rest):
            found.setdefault(stack, []).append(name)
    return found


def _first(config: Any, *names: str) -> int:
    """Return the first positive integer that a config has under one of the names, or 0."""
    values = (_value(config, name) for name in names)
    return next((int(v) for v in values if isinstance(v, int) and v > 0), 0)


def _value(config: Any, name: str) -> Any:
    """Return a value of the config; the largest one if it differs between layers.

    Configs of some models (gemma4, dots3_note) raise a ``RuntimeError`` for such a value.
    """
    try:
        return getattr(config, name, None)
    except RuntimeError:
        layers = config.per_layer_config
        values = [getattr(layers[i], name, None) for i in range(len(layers))]
        return max((v for v in values if isinstance(v, int)), default=None)
