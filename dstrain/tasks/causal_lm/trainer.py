"""Trainer of causal language models: adds perplexity and bits per byte to evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dstrain.config.resolution.batch import eval_micro_batch
from dstrain.core.adapters import inner_model
from dstrain.core.errors import ConfigError, Problem
from dstrain.core.ranks import gather_objects
from dstrain.tasks.causal_lm.chat import joined
from dstrain.trainer import Trainer
from dstrain.training.packed_sequences import mixes_sequences


class CausalLMTrainer(Trainer):
    """A ``Trainer`` that knows how many tokens a byte of the evaluation text takes."""

    def __init__(
        self,
        *args: Any,
        tokens_per_byte: float | None = None,
        sequence_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep what a language model adds; pass the rest to ``Trainer``.

        Args:
            *args: of ``Trainer``.
            tokens_per_byte: tokens per UTF-8 byte of the evaluation text.
            sequence_length: tokens of one block.
            **kwargs: of ``Trainer``.
        """
        self.tokens_per_byte = tokens_per_byte
        self.sequence_length = sequence_length
        super().__init__(*args, **kwargs)

    def refuse_mixing(self) -> None:
        """Refuse to pack for a model that mixes conversations, as a trial on all ranks shows.

        Raises:
            ConfigError: a conversation would see those before it in its sample.
        """
        # Some attention kernels heed positions in a batch of one row only.
        evaluated = eval_micro_batch(self.args, self.ranks.world_size)
        most = max(self.resolved.micro_batch_size, evaluated)
        rows = min(2, most)

        def batch_of(conversations: Sequence[list[int]]) -> Any:
            sample = joined([(tokens, tokens) for tokens in conversations])
            return self.data_collator([sample] * rows)

        model = self._engines.forward_model(self.model, self.resolved)
        mixes = mixes_sequences(model, self.model, batch_of, self._prepare_inputs)
        if any(gather_objects(mixes)):
            raise ConfigError(
                Problem(
                    f"packing=True with {type(inner_model(self.model)).__name__}",
                    "this model lets a conversation see those before it in its sample, although "
                    "its position_ids begin anew",
                    "drop --packing",
                )
            )

    def derived_metrics(self, metrics: dict[str, float], prefix: str) -> dict[str, float]:
        """Compute perplexity, and bits per byte, which are comparable across tokenizers.

        bits per byte = loss (nats per token) x tokens per byte / ln 2.
        """
        loss = metrics.get(f"{prefix}_loss")
        if loss is None:
            return {}
        derived = {f"{prefix}_perplexity": math.exp(min(loss, 700.0))}
        if self.tokens_per_byte is not None:
            derived[f"{prefix}_bits_per_byte"] = loss * self.tokens_per_byte / math.log(2)
        return derived
