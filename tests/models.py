"""Models and data small enough for a CPU rank, the same at every call and on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import nn
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, T5ForConditionalGeneration

VOCAB_SIZE = 259  # bytes and three special tokens; odd, so that it divides by no world size
PAD_TOKEN_ID = 0
IGNORE_INDEX = -100
SEED = 1234


class Example(TypedDict):
    """One sequence: token ids, and as many labels, some of them `IGNORE_INDEX`."""

    input_ids: list[int]
    labels: list[int]


def tiny_llama_config(**overrides: object) -> LlamaConfig:
    """Return the config of `tiny_llama`."""
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "pad_token_id": PAD_TOKEN_ID,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**sizes | overrides)


def tiny_llama(**overrides: object) -> LlamaForCausalLM:
    """Return a Llama of about 115 thousand parameters, always with the same weights."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return LlamaForCausalLM(tiny_llama_config(**overrides))


class RegressionModel(nn.Module):
    """A plain module, no transformers in it, that returns (loss, prediction) or (prediction,)."""

    def __init__(self, in_features: int = 8, hidden_features: int = 16) -> None:
        """Initialise the weights from the fixed seed."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.hidden = nn.Linear(in_features, hidden_features)
            self.norm = nn.LayerNorm(hidden_features)
            self.head = nn.Linear(hidden_features, 1)

    def forward(
        self, x: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Map x [batch, in] to a prediction [batch]; the loss is the mean squared error."""
        prediction = self.head(self.norm(torch.tanh(self.hidden(x)))).squeeze(-1)
        if labels is None:
            return (prediction,)
        return nn.functional.mse_loss(prediction, labels), prediction


class RaggedTokens(Dataset[Example]):
    """Token sequences of different lengths; every second one ignores the labels of its prompt."""

    def __init__(
        self, num_examples: int = 32, *, min_length: int = 4, max_length: int = 24, seed: int = SEED
    ) -> None:
        """Draw all sequences from ``seed``."""
        draw = torch.Generator().manual_seed(seed)
        self.examples: list[Example] = []
        for index in range(num_examples):
            length = int(torch.randint(min_length, max_length + 1, (), generator=draw))
            # Special tokens stay out of the sequences.
            input_ids = torch.randint(3, VOCAB_SIZE, (length,), generator=draw).tolist()
            prompt_length = length // 2 if index % 2 else 0
            labels = [IGNORE_INDEX] * prompt_length + input_ids[prompt_length:]
            self.examples.append({"input_ids": input_ids, "labels": labels})

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        """Return sequence ``index``."""
        return self.examples[index]


def pad_collate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Pad on the right: input_ids, attention_mask and labels, each [batch, longest]."""
    longest = max(len(example["input_ids"]) for example in examples)

    def padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    rows = [example["input_ids"] for example in examples]
    return {
        "input_ids": padded(rows, PAD_TOKEN_ID),
        "attention_mask": padded([[1] * len(row) for row in rows], 0),
        "labels": padded([example["labels"] for example in examples], IGNORE_INDEX),
    }


def tiny_t5() -> T5ForConditionalGeneration:
    """Return a T5 of about 35 thousand parameters, always with the same weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=PAD_TOKEN_ID,
        pad_token_id=PAD_TOKEN_ID,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return T5ForConditionalGeneration(config)
