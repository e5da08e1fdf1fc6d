"""Trainer of pairs: evaluates generated text, and knows how long a sample is."""

from __future__ import annotations

from typing import Any

from dstrain.trainer import Seq2SeqTrainer


class PairsTrainer(Seq2SeqTrainer):
    """A ``Seq2SeqTrainer`` that knows the tokens of a sample before it sees one."""

    def __init__(self, *args: Any, sequence_length: int | None = None, **kwargs: Any) -> None:
        """Keep what the task adds; pass the rest to ``Seq2SeqTrainer``.

        Args:
            *args: of ``Seq2SeqTrainer``.
            sequence_length: tokens of the longest source and target together, for
                ``zero_stage="auto"``.
            **kwargs: of ``Seq2SeqTrainer``.
        """
        self.sequence_length = sequence_length
        super().__init__(*args, **kwargs)
