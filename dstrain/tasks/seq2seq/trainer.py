"""Trainer of the sequence-to-sequence task."""

from __future__ import annotations

from typing import Any

from dstrain.trainer import Seq2SeqTrainer


class PairsTrainer(Seq2SeqTrainer):
    """A ``Seq2SeqTrainer`` that is given the tokens of its longest sample."""

    def __init__(self, *args: Any, sequence_length: int | None = None, **kwargs: Any) -> None:
        """Create the trainer.

        Args:
            *args: passed to ``Seq2SeqTrainer``.
            sequence_length: tokens of the longest source and target together, for
                ``zero_stage="auto"``.
            **kwargs: passed to ``Seq2SeqTrainer``.
        """
        self.sequence_length = sequence_length
        super().__init__(*args, **kwargs)
