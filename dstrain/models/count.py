"""Counts the parameters of any architecture that transformers knows, without memory for them.

``python -m dstrain.models.count SPEC`` prints ``ModelSizes`` as JSON. A program of its own, so that
who asks need not import torch.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch

from dstrain.config.parameters import Block, ModelSizes, Tensors, merged
from dstrain.core.errors import DstrainError, ModelError, Problem
from dstrain.models.build import parse_model_config

_LAYER = re.compile(r"\.\d+\.")
_GATES = ("gate_proj", "gate_up_proj", "wi_0", "w1.")


def count_parameters(spec: str) -> ModelSizes:
    """Sizes of the model that ``spec`` describes, from the modules themselves.

    Raises:
        ModelError: the config cannot be read, or no model class takes it.
    """
    config = parse_model_config(spec)
    module = _build(config)
    tensors = [
        Tensors(_part(name), tuple(p.shape), 1, p.requires_grad)
        for name, p in module.named_parameters()
    ]
    names = [name for name, _ in module.named_parameters()]
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return ModelSizes(
        config.model_type,
        "built without memory",
        merged(tensors),
        int(getattr(text, "vocab_size", 0) or 0),
        _block(text, names),
    )


def _build(config: Any) -> torch.nn.Module:
    """The model on the meta device, by the class that the config names, else a usual one."""
    import transformers

    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    autos = [transformers.AutoModelForCausalLM, transformers.AutoModel]
    if getattr(config, "is_encoder_decoder", False):
        autos.insert(0, transformers.AutoModelForSeq2SeqLM)
    elif getattr(config, "vision_config", None) is not None:
        autos.insert(0, transformers.AutoModelForImageTextToText)
    failure: Exception | None = None
    with torch.device("meta"):
        if named is not None:
            return named(config)
        for auto in autos:
            try:
                return auto.from_config(config)
            except ValueError as error:
                failure = failure or error
    raise ModelError(Problem(f"model type {config.model_type!r} cannot be built", str(failure)))


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


def main() -> int:
    """Print the sizes of the model named by the only argument."""
    try:
        print(json.dumps(count_parameters(sys.argv[1]).to_dict()))
    except DstrainError as error:
        problems = [[p.what, p.why, p.remedy] for p in error.problems]
        print(json.dumps({"problems": problems}))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
