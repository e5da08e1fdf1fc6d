"""Small causal language models of several families, with the cache on in their config."""

from __future__ import annotations

from typing import Any

import torch

SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
GROUPED = SMALL | {"num_key_value_heads": 2}


def build_small(family: str, attention: str = "sdpa") -> Any:
    """Build a tiny model with the cache on in its config, as published ones have it."""
    import transformers as t

    configs = {
        "llama": lambda: t.LlamaConfig(**GROUPED),
        "qwen2": lambda: t.Qwen2Config(**GROUPED),
        "gpt_neox": lambda: t.GPTNeoXConfig(**SMALL, hidden_dropout=0.0),
        # Two layers of sliding attention, which has a mask of its own.
        "gemma3": lambda: t.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=6),
    }
    config = configs[family]()
    assert config.use_cache
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def build_mixing(family: str) -> Any:
    """Build a tiny model of a family that mixes sequences which share a row."""
    import transformers as t

    torch.manual_seed(0)
    configs: dict[str, Any] = {
        "bloom": lambda: t.BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4),
        "mamba": lambda: t.MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2),
        # Takes position_ids, and makes its mask without them.
        "opt": lambda: t.OPTConfig(
            vocab_size=259,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
        ),
    }
    return t.AutoModelForCausalLM.from_config(configs[family]())
