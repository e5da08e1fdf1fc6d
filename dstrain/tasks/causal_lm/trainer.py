"""Trainer of causal language models: adds perplexity and bits per byte to evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dstrain.config.resolution.batch import eval_micro_batch
from dstrain.core.adapters import inner_model
from dstrain.core.errors import ConfigError, Problem
from dstrain.core.ranks import on_any_rank
from dstrain.tasks.causal_lm.chat import joined
from dstrain.trainer import Trainer
from dstrain.training.packed_sequences import mixes_sequences


class CausalLMTrainer(Trainer):
    """A ``Trainer`` with metrics of language models, and a check for packed conversations."""

    def __init__(
        self,
        *args: Any,
        tokens_per_byte: float | None = None,
        sequence_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Create the trainer.

        Args:
            *args: passed to ``Trainer``.
            tokens_per_byte: tokens per UTF-8 byte of the evaluation text; without it there are no
                bits per byte.
            sequence_length: tokens of the longest sample, for ``zero_stage="auto"``.
            **kwargs: passed to ``Trainer``.
        """
        self.tokens_per_byte = tokens_per_byte
        self.sequence_length = sequence_length
        super().__init__(*args, **kwargs)

    def refuse_mixing(self) -> None:
        """Refuse to pack for a model in which conversations of a sample attend to each other.

        That is found by trying forward passes, in which all ranks take part.

        Raises:
            ConfigError: a conversation attends to those before it in its sample.
        """
        # Some attention kernels use positions only in a batch of one row.
        evaluated = eval_micro_batch(self.args, self.ranks.world_size)
        most = max(self.resolved.micro_batch_size, evaluated)
        rows = min(2, most)

        def batch_of(conversations: Sequence[list[int]]) -> Any:
            sample = joined([(tokens, tokens) for tokens in conversations])
            return self.data_collator([sample] * rows)

        model = self._engines.forward_model(self.model, self.resolved)
        mixes = mixes_sequences(model, self.model, batch_of, self._prepare_inputs)
        if on_any_rank(bool(mixes)):
            raise ConfigError(
                Problem(
                    f"packing=True with {type(inner_model(self.model)).__name__}",
                    "this model lets a conversation see those before it in its sample, although "
                    "its position_ids begin anew",
                    "drop --packing",
                )
            )

    def derived_metrics(self, metrics: dict[str, float], prefix: str) -> dict[str, float]:
        """Compute perplexity and bits per byte from the loss.

        Bits per byte are loss (nats per token) x tokens per byte / ln 2. They do not depend on the
        tokenizer, so that models with different ones can be compared.
        """
        loss = metrics.get(f"{prefix}_loss")
        if loss is None:
            return {}
        derived = {f"{prefix}_perplexity": math.exp(min(loss, 700.0))}
        if self.tokens_per_byte is not None:
            derived[f"{prefix}_bits_per_byte"] = loss * self.tokens_per_byte / math.log(2)
        return derived
