"""Bytes of activations and logits of one micro-batch, per rank.

After Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models"
(section 4, equation 1 and its derivation): each operation keeps for backward the tensors that its
derivative needs. Their layer (dropout, GeLU, fused softmax, 16 bits) is replaced by the layers of
transformers: RMSNorm that computes in fp32, gated feed-forward, fewer key and value heads, experts,
and attention kernels that do not store the scores.
"""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.config.memory.sizes import Block

FP32 = 4
ATTENTION = ("sdpa", "flash_attention_2", "eager")


@dataclass(frozen=True)
class Batch:
    """A micro-batch on one rank.

    Attributes:
        micro_batch: sequences.
        seq_len: tokens per sequence.
        width: bytes per value in the training format, 2 or 4.
        attention: one of ``ATTENTION``.
        checkpointing: layers keep only their input, and are computed again in backward.
    """

    micro_batch: int
    seq_len: int
    width: int
    attention: str = "sdpa"
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        """Return the tokens of the micro-batch."""
        return self.micro_batch * self.seq_len


def norm_bytes_per_token(block: Block, width: int) -> int:
    """Return the bytes per token that one normalisation keeps for backward.

    RMSNorm (``modeling_llama.py:LlamaRMSNorm.forward``): its input in fp32 for ``pow`` and ``mul``,
    the normalised value for the product with the weight, and its output, the input of the next
    linear map. LayerNorm (Korthikanti 4.1: "2sbh"): input and output, mean and deviation in fp32.
    """
    if block.rms_norm:
        return block.hidden * (FP32 + 2 * width) + FP32
    return block.hidden * 2 * width + 2 * FP32


def attention_bytes_per_token(block: Block, batch: Batch) -> int:
    """Return the bytes per token that one attention keeps besides its normalised input.

    Korthikanti 4.1, "Attention block": queries, keys and values, and the input of the output
    projection; for eager attention also the fp32 softmax and its copy in the training format
    (``modeling_llama.py:eager_attention_forward``; with dropout its mask and product), and the keys
    and values repeated for every query head. The flash kernels behind sdpa keep the log-sum-exp of
    each row instead (Dao et al. 2022, algorithm 4), and grouped keys as they are.
    """
    w, queries, keys = batch.width, block.heads * block.head_dim, block.kv_heads * block.head_dim
    kept = w * (2 * queries + 2 * keys)  # queries, output, keys, values
    if block.qk_norm:
        kept += (queries + keys) * (FP32 + w)
    if batch.attention != "eager":
        return kept + FP32 * block.heads
    scores = block.heads * batch.seq_len * (FP32 + w + ((1 + w) if block.dropout else 0))
    repeated = 2 * w * (queries - keys) if block.kv_heads < block.heads else 0
    return kept + repeated + scores


def feed_forward_bytes_per_token(block: Block, width: int) -> int:
    """Return the bytes per token that the feed-forward part keeps besides its normalised input.

    Korthikanti 4.1, "MLP" ("8sbh" for the input of GeLU and of the second map, of 4h each). A gated
    feed-forward part keeps gate, activated gate, the second projection and their product. Each
    expert that a token passes keeps these values, and a copy of the token's input.
    """
    values = block.ffn * (
        2 + block.activation_tensors if block.gated else 1 + block.activation_tensors
    )
    values += block.ffn if block.gated else 0
    if block.experts_per_token > 1:
        values = block.experts_per_token * (values + 2 * block.hidden)
    return values * width


def layer_bytes(block: Block, batch: Batch) -> int:
    """Return the bytes that one layer keeps without checkpointing (Korthikanti, equation 1)."""
    per_token = block.norms * norm_bytes_per_token(block, batch.width)
    per_token += attention_bytes_per_token(block, batch)
    per_token += feed_forward_bytes_per_token(block, batch.width)
    if block.dropout:
        per_token += 2 * block.hidden  # masks, one byte each
    if block.cross_layers:
        extra = attention_bytes_per_token(block, batch) + norm_bytes_per_token(block, batch.width)
        per_token += extra * block.cross_layers // block.layers
    return per_token * batch.tokens


def activation_bytes(block: Block, batch: Batch) -> int:
    """Return the bytes of activations that are kept when the forward pass ends.

    They are the activations of all layers, or with checkpointing the input of each layer
    (Korthikanti 5, "full activation recomputation": "2sbhL"), and those of the last normalisation.
    """
    last = norm_bytes_per_token(block, batch.width) * batch.tokens
    if batch.checkpointing:
        return block.layers * block.hidden * batch.width * batch.tokens + last
    return block.layers * layer_bytes(block, batch) + last


def recomputed_bytes(block: Block, batch: Batch) -> int:
    """Return the bytes that are added while backward is inside one layer.

    They are the gradients of the layer's two widest values and of the residual stream, and with
    checkpointing also the layer's activations.
    """
    gradients = (
        (2 * block.ffn * block.experts_per_token + block.hidden) * batch.width * batch.tokens
    )
    return gradients + (layer_bytes(block, batch) if batch.checkpointing else 0)


def logits_bytes(vocab_size: int, batch: Batch, *, fp32_loss: bool = True) -> int:
    """Return the most bytes that logits and loss take at once.

    ``loss_utils.py:ForCausalLMLoss`` converts logits to fp32. When backward begins three tensors
    are alive (torch ``derivatives.yaml``: ``nll_loss_forward``, ``_log_softmax``): the log-softmax
    kept for backward, the gradient with respect to it, and the gradient with respect to its input.
    Forward needs less: logits in the training format, logits in fp32, and their log-softmax.
    """
    width = FP32 if fp32_loss else batch.width
    return 3 * width * vocab_size * batch.tokens


def logits_gradient_bytes(vocab_size: int, batch: Batch) -> int:
    """Return the bytes of the logits' gradient, from which the head's gradient is computed."""
    return batch.width * vocab_size * batch.tokens
