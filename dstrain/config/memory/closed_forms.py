"""Closed forms of the parameters of common architectures.

Each form follows the modules of transformers' ``modeling_<type>.py``, with the defaults of the
config class. ``tests/unit/models/test_count.py`` compares every form with a model that is built on
the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.config.memory import classic_forms as classic
from dstrain.config.memory.classic_forms import Reader, linear
from dstrain.config.memory.model_spec import read_spec
from dstrain.config.memory.sizes import Block, ModelSizes, Tensors, merged

# Keys of a config that change neither parameters nor the form of a layer.
READ_BY_NOTHING = {
    "model_type", "architectures", "max_position_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon",
    "initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "dtype",
    "torch_dtype", "transformers_version", "attention_dropout", "sliding_window",
    "use_sliding_window", "max_window_layers", "layer_types", "partial_rotary_factor",
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Closed form of an architecture's parameters.

    Attributes:
        architectures: model classes with this form; the first is built by default.
        sizes: reader of a config -> parameters, and form of a layer.
        vocab_size: default size of the vocabulary.
    """

    architectures: tuple[str, ...]
    sizes: Callable[[Reader], tuple[list[Tensors], Block]]
    vocab_size: int


@dataclass(frozen=True)
class _Gated:
    """Form of Llama and its relatives: RMSNorm, rotary positions, gated feed-forward."""

    vocab_size: int = 32000
    hidden: int = 4096
    ffn: int = 11008
    layers: int = 32
    heads: int = 32
    kv_heads: int | None = None
    head_dim: int | None = None
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    fused: bool = False
    norms: int = 2
    experts: int = 0
    experts_per_token: int = 2
    moe_ffn: int | None = None

    def __call__(self, c: Reader) -> tuple[list[Tensors], Block]:
        h, n = c.number(self.hidden, "hidden_size"), c.number(self.layers, "num_hidden_layers")
        heads = c.number(self.heads, "num_attention_heads")
        kv = c.number(self.kv_heads or heads, "num_key_value_heads")
        d = c.number(self.head_dim or h // heads, "head_dim")
        ffn, vocab = (
            c.number(self.ffn, "intermediate_size"),
            c.number(self.vocab_size, "vocab_size"),
        )
        bias = bool(c(False, "attention_bias"))
        qkv_bias, mlp_bias = self.qkv_bias or bias, bool(c(False, "mlp_bias"))
        tensors = [Tensors("embedding", (vocab, h)), Tensors("other", (h,))]
        tensors.append(Tensors("layer", (h,), self.norms * n))
        if self.fused:
            tensors += linear("layer", (heads + 2 * kv) * d, h, n)
            tensors += linear("layer", 2 * ffn, h, n)
        else:
            tensors += linear("layer", heads * d, h, n, qkv_bias)
            tensors += linear("layer", kv * d, h, 2 * n, qkv_bias)
        tensors += linear("layer", h, heads * d, n, bias)
        if self.qk_norm:
            tensors.append(Tensors("layer", (d,), 2 * n))
        experts = 0
        if self.experts:
            experts = c.number(self.experts, "num_local_experts", "num_experts")
            ffn = c.number(self.moe_ffn or ffn, "moe_intermediate_size") if self.moe_ffn else ffn
            if c(None, "mlp_only_layers") or c(1, "decoder_sparse_step") != 1:
                raise ValueError("some layers are dense")
            tensors.append(Tensors("layer", (experts, h), n))
            tensors.append(Tensors("layer", (experts, 2 * ffn, h), n))
            tensors.append(Tensors("layer", (experts, h, ffn), n))
        else:
            if not self.fused:
                tensors += linear("layer", ffn, h, 2 * n, mlp_bias)
            tensors += linear("layer", h, ffn, n, mlp_bias)
        if not c(self.tied, "tie_word_embeddings"):
            tensors.append(Tensors("head", (vocab, h)))
        per_token = c.number(self.experts_per_token, "num_experts_per_tok") if experts else 1
        return tensors, Block(
            n, h, heads, kv, d, ffn, norms=self.norms, qk_norm=self.qk_norm,
            experts_per_token=per_token,
        )  # fmt: skip


def _gated_family(name: str, form: _Gated) -> Family:
    return Family((f"{name}ForCausalLM",), form, form.vocab_size)


FAMILIES: dict[str, Family] = {
    "llama": _gated_family("Llama", _Gated()),
    "mistral": _gated_family("Mistral", _Gated(ffn=14336, kv_heads=8)),
    "qwen2": _gated_family("Qwen2", _Gated(vocab_size=151936, ffn=22016, qkv_bias=True)),
    "qwen3": _gated_family(
        "Qwen3", _Gated(vocab_size=151936, ffn=22016, head_dim=128, qk_norm=True)
    ),
    "qwen3_moe": _gated_family(
        "Qwen3Moe",
        _Gated(
            vocab_size=151936, hidden=2048, ffn=6144, layers=24, kv_heads=4, qk_norm=True,
            experts=128, experts_per_token=8, moe_ffn=768,
        ),
    ),
    "mixtral": _gated_family("Mixtral", _Gated(ffn=14336, kv_heads=8, experts=8)),
    "phi3": _gated_family("Phi3", _Gated(vocab_size=32064, hidden=3072, ffn=8192, fused=True)),
    "gemma": _gated_family(
        "Gemma",
        _Gated(
            vocab_size=256000, hidden=3072, ffn=24576, layers=28, heads=16, head_dim=256, tied=True
        ),
    ),
    "gemma2": _gated_family(
        "Gemma2",
        _Gated(
            vocab_size=256000, hidden=2304, ffn=9216, layers=26, heads=8, kv_heads=4, head_dim=256,
            tied=True, norms=4,
        ),
    ),
    "gpt2": Family(("GPT2LMHeadModel",), classic.gpt2, 50257),
    "gpt_neox": Family(("GPTNeoXForCausalLM",), classic.gpt_neox, 50432),
    "bloom": Family(("BloomForCausalLM",), classic.bloom, 250880),
    "falcon": Family(("FalconForCausalLM",), classic.falcon, 65024),
    "opt": Family(("OPTForCausalLM",), classic.opt, 50272),
    "bert": Family(("BertForMaskedLM",), classic.bert, 30522),
    "t5": Family(("T5ForConditionalGeneration",), classic.t5, 32128),
}  # fmt: skip


def sizes_of(spec: str, count: Callable[[str], ModelSizes]) -> ModelSizes:
    """Return the sizes of the model that a config describes.

    Args:
        spec: a config as in ``read_spec``.
        count: returns the sizes of a model without a closed form, by building it.

    Raises:
        ModelError: the config cannot be read.
    """
    values, short = read_spec(spec)
    found = closed_form(values, strict=short)
    return found if found is not None else count(spec)


def closed_form(values: Mapping[str, Any], *, strict: bool = False) -> ModelSizes | None:
    """Return the sizes by formula; None if there is no formula for this config.

    Args:
        values: values of a model config, with ``model_type``.
        strict: return None if the config has keys that the formula does not read.
    """
    family = FAMILIES.get(str(values.get("model_type")))
    architectures = values.get("architectures") or []
    if family is None or (architectures and architectures[0] not in family.architectures):
        return None
    if values.get("quantization_config"):
        return None
    reader = Reader(values)
    try:
        tensors, block = family.sizes(reader)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    if strict and set(values) - reader.names - READ_BY_NOTHING:
        return None
    return ModelSizes(
        str(values["model_type"]),
        "closed form",
        merged(tensors),
        reader.number(family.vocab_size, "vocab_size"),
        block,
    )
