"""Closed forms of architectures with LayerNorm or without gates, and T5; parts of all forms.

``closed_forms.py`` has the table of forms, and the form of Llama and its relatives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dstrain.config.memory.sizes import Block, Tensors


class Reader:
    """Reader of config values that have several names; it keeps the names that were read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """Keep the values to read from."""
        self._values = values
        self.names: set[str] = set()

    def __call__(self, default: Any, *names: str) -> Any:
        """Return the value of the first of ``names`` that has one; else ``default``."""
        self.names.update(names)
        found = (self._values[n] for n in names if self._values.get(n) is not None)
        return next(found, default)

    def number(self, default: int, *names: str) -> int:
        """Return the value of the first of ``names`` that has one, as a whole number."""
        return int(self(default, *names))


def linear(part: str, out: int, width: int, count: int, bias: bool = False) -> Iterator[Tensors]:
    """Yield the weight of a linear map, and its bias if it has one."""
    yield Tensors(part, (out, width), count)
    if bias:
        yield Tensors(part, (out,), count)


def layer_norm(part: str, width: int, count: int) -> Tensors:
    """Return the weights and biases of ``count`` LayerNorms."""
    return Tensors(part, (width,), 2 * count)


def _plain(
    *, hidden: int, layers: int, heads: int, ffn: int, kv: int | None = None,
    gelu: int = 1, dropout: bool = False, norms: int = 2, cross: int = 0, fp32_loss: bool = True,
) -> Block:  # fmt: skip
    """Return the form of a layer with LayerNorm and an ungated feed-forward part."""
    return Block(
        layers, hidden, heads, kv or heads, hidden // heads, ffn, gated=False, rms_norm=False,
        norms=norms, activation_tensors=gelu, dropout=dropout, cross_layers=cross,
        fp32_loss=fp32_loss,
    )  # fmt: skip


def _fused_attention(
    h: int, n: int, ffn: int, *, bias: bool = True, qkv: int | None = None, norms: int = 2
) -> list[Tensors]:
    """Return parameters of layers with a joint query-key-value projection, ungated."""
    tensors = [layer_norm("layer", h, norms * n)]
    tensors += linear("layer", qkv or 3 * h, h, n, bias)
    tensors += linear("layer", h, h, n, bias)
    tensors += linear("layer", ffn, h, n, bias)
    tensors += linear("layer", h, ffn, n, bias)
    return tensors


def gpt2(c: Reader) -> tuple[list[Tensors], Block]:
    """Return parameters and layer form of GPT-2."""
    h, n = c.number(768, "n_embd", "hidden_size"), c.number(12, "n_layer", "num_hidden_layers")
    heads = c.number(12, "n_head", "num_attention_heads")
    vocab, ffn = c.number(50257, "vocab_size"), c.number(4 * h, "n_inner")
    if c(False, "add_cross_attention"):
        raise ValueError("cross attention")
    positions = c.number(1024, "n_positions", "max_position_embeddings")
    tensors = _fused_attention(h, n, ffn)
    # Conv1D keeps its weights as (in, out).
    tensors = [Tensors(t.part, t.shape[::-1], t.count) for t in tensors]
    tensors += [Tensors("embedding", (vocab, h)), Tensors("embedding", (positions, h))]
    tensors.append(layer_norm("other", h, 1))
    if not c(True, "tie_word_embeddings"):
        tensors.append(Tensors("head", (vocab, h)))
    dropout = any(c(0.1, name) for name in ("resid_pdrop", "attn_pdrop", "embd_pdrop"))
    # NewGELUActivation is written out in elementary operations.
    return tensors, _plain(hidden=h, layers=n, heads=heads, ffn=ffn, gelu=4, dropout=dropout)


def gpt_neox(c: Reader) -> tuple[list[Tensors], Block]:
    """Return parameters and layer form of GPT-NeoX."""
    h, n = c.number(6144, "hidden_size"), c.number(44, "num_hidden_layers")
    heads, ffn = c.number(64, "num_attention_heads"), c.number(24576, "intermediate_size")
    vocab = c.number(50432, "vocab_size")
    if not c(True, "attention_bias"):
        raise ValueError("without biases")
    tensors = [*_fused_attention(h, n, ffn), Tensors("embedding", (vocab, h))]
    tensors.append(layer_norm("other", h, 1))
    if not c(False, "tie_word_embeddings"):
        tensors.append(Tensors("head", (vocab, h)))
    dropout = bool(c(0.0, "hidden_dropout"))
    return tensors, _plain(hidden=h, layers=n, heads=heads, ffn=ffn, dropout=dropout)


def bloom(c: Reader) -> tuple[list[Tensors], Block]:
    """Return parameters and layer form of BLOOM."""
    h, n = c.number(64, "hidden_size", "n_embed"), c.number(2, "n_layer", "num_hidden_layers")
    heads, vocab = c.number(8, "n_head", "num_attention_heads"), c.number(250880, "vocab_size")
    tensors = [*_fused_attention(h, n, 4 * h), Tensors("embedding", (vocab, h))]
    tensors += [layer_norm("embedding", h, 1), layer_norm("other", h, 1)]
    if not c(True, "tie_word_embeddings"):
        tensors.append(Tensors("head", (vocab, h)))
    return tensors, _plain(hidden=h, layers=n, heads=heads, ffn=4 * h, gelu=4)


def falcon(c: Reader) -> tuple[list[Tensors], Block]:
    """Return parameters and layer form of Falcon."""
    h = c.number(4544, "hidden_size")
    n = c.number(32, "num_hidden_layers", "n_layer")
    heads = c.number(71, "num_attention_heads", "n_head")
    d, bias, new = h // heads, bool(c(False, "bias")), bool(c(False, "new_decoder_architecture"))
    kv = c.number(heads, "num_kv_heads", "n_head_kv") if new else heads
    if not new and c(True, "multi_query"):
        kv = 1
    ffn, vocab = c.number(4 * h, "ffn_hidden_size"), c.number(65024, "vocab_size")
    parallel = bool(c(True, "parallel_attn"))
    norms = c.number(2, "num_ln_in_parallel_attn") if new else (1 if parallel else 2)
    tensors = _fused_attention(h, n, ffn, bias=bias, qkv=(heads + 2 * kv) * d, norms=norms)
    tensors += [Tensors("embedding", (vocab, h)), layer_norm("other", h, 1)]
    if not c(True, "tie_word_embeddings"):
        tensors.append(Tensors("head", (vocab, h)))
    return tensors, _plain(hidden=h, layers=n, heads=heads, ffn=ffn, kv=kv, norms=norms)


def opt(c: Reader) -> tuple[list[Tensors], Block]:
    """Return parameters and layer form of OPT."""
    h, n = c.number(768, "hidden_size"), c.number(12, "num_hidden_layers")
    heads, ffn = c.number(12, "num_attention_heads"), c.number(3072, "ffn_dim")
    vocab, narrow = c.number(50272, "vocab_size"), c.number(h, "word_embed_proj_dim")
    positions = c.number(2048, "max_position_embeddings") + 2
    if not (c(True, "enable_bias") and c(True, "layer_norm_elementwise_affine")):
        raise ValueError("without biases")
    tensors = [Tensors("layer", (h,), 4 * n), *linear("layer", h, h, 4 * n, True)]
    tensors += [*linear("layer", ffn, h, n, True), *linear("layer", h, ffn, n, True)]
    tensors += [Tensors("embedding", (vocab, narrow)), Tensors("embedding", (positions, h))]
    if c(True, "do_layer_norm_before") and not c(False, "_remove_final_layer_norm"):
        tensors.append(layer_norm("other", h, 1))
    if narrow != h:
        tensors += [Tensors("other", (h, narrow)), Tensors("other", (narrow, h))]
    if not c(True, "tie_word_embeddings"):
        tensors.append(Tensors("head", (vocab, narrow)))
    dropout = bool(c(0.1, "dropout"))
    return tensors, _plain(hidden=h, layers=n, heads=heads, ffn=ffn, dropout=dropout)


def bert(c: Reader) -> tuple[list[Tensors], Block]:
    """Return parameters and layer form of BERT with its masked language model head."""
    h, n = c.number(768, "hidden_size"), c.number(12, "num_hidden_layers")
    heads, ffn = c.number(12, "num_attention_heads"), c.number(3072, "intermediate_size")
    vocab, positions = c.number(30522, "vocab_size"), c.number(512, "max_position_embeddings")
    kinds = c.number(2, "type_vocab_size")
    if c(False, "add_cross_attention") or not c(True, "tie_word_embeddings"):
        raise ValueError("a form of its own")
    tensors = [Tensors("embedding", (rows, h)) for rows in (vocab, positions, kinds)]
    tensors += [layer_norm("embedding", h, 1), layer_norm("layer", h, 2 * n)]
    tensors += [*linear("layer", h, h, 4 * n, True)]
    tensors += [*linear("layer", ffn, h, n, True), *linear("layer", h, ffn, n, True)]
    tensors += [Tensors("head", (vocab,)), *linear("head", h, h, 1, True)]
    tensors.append(layer_norm("head", h, 1))
    dropout = bool(c(0.1, "hidden_dropout_prob"))
    return tensors, _plain(hidden=h, layers=n, heads=heads, ffn=ffn, dropout=dropout)


def t5(c: Reader) -> tuple[list[Tensors], Block]:
    """Return parameters and layer form of T5, encoder and decoder."""
    h, ffn = c.number(512, "d_model", "hidden_size"), c.number(2048, "d_ff")
    inner = c.number(8, "num_heads", "num_attention_heads") * c.number(64, "d_kv")
    n = c.number(6, "num_layers", "num_hidden_layers")
    decoder, vocab = c.number(n, "num_decoder_layers"), c.number(32128, "vocab_size")
    # A saved config has both; if they differ T5Config uses the flag.
    gated = bool(c(str(c("relu", "feed_forward_proj")).startswith("gated"), "is_gated_act"))
    attentions, both = n + 2 * decoder, n + decoder
    tensors = [Tensors("embedding", (vocab, h)), Tensors("other", (h,), 2)]
    tensors += [Tensors("layer", (h,), 2 * n + 3 * decoder)]
    tensors += [*linear("layer", inner, h, 3 * attentions), *linear("layer", h, inner, attentions)]
    tensors += [*linear("layer", ffn, h, (2 if gated else 1) * both)]
    tensors += [*linear("layer", h, ffn, both)]
    buckets = c.number(32, "relative_attention_num_buckets")
    tensors.append(Tensors("layer", (buckets, c.number(8, "num_heads", "num_attention_heads")), 2))
    c.names.add("tie_word_embeddings")  # T5Config ties them whatever the file says
    heads, d = c.number(8, "num_heads"), c.number(64, "d_kv")
    return tensors, Block(
        both, h, heads, heads, d, ffn, gated=gated, dropout=bool(c(0.1, "dropout_rate")),
        cross_layers=decoder, fp32_loss=False,
    )  # fmt: skip
