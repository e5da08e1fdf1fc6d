"""The Trainer of causal language models: adds perplexity and bits per byte to evaluations."""

from __future__ import annotations

import math
from typing import Any

from dstrain.trainer import Trainer


class CausalLMTrainer(Trainer):
    """A ``Trainer`` that knows how many tokens a byte of the evaluation text takes."""

    def __init__(
        self,
        *args: Any,
        tokens_per_byte: float | None = None,
        sequence_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        """What a language model adds; the rest goes to ``Trainer``.

        Args:
            *args: of ``Trainer``.
            tokens_per_byte: of the evaluation text.
            sequence_length: tokens of one block.
            **kwargs: of ``Trainer``.
        """
        self.tokens_per_byte = tokens_per_byte
        self.sequence_length = sequence_length
        super().__init__(*args, **kwargs)

    def derived_metrics(self, metrics: dict[str, float], prefix: str) -> dict[str, float]:
        """Perplexity, and bits per byte, which tokenizers of any vocabulary can be compared by.

        bits per byte = loss (nats per token) x tokens per byte / ln 2.
        """
        loss = metrics.get(f"{prefix}_loss")
        if loss is None:
            return {}
        derived = {f"{prefix}_perplexity": math.exp(min(loss, 700.0))}
        if self.tokens_per_byte is not None:
            derived[f"{prefix}_bits_per_byte"] = loss * self.tokens_per_byte / math.log(2)
        return derived
