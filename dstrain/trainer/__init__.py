"""``Trainer`` and ``Seq2SeqTrainer``, and building models partitioned."""

from dstrain.trainer.build import partitioned
from dstrain.trainer.seq2seq import Seq2SeqTrainer
from dstrain.trainer.trainer import Trainer

__all__ = ["Seq2SeqTrainer", "Trainer", "partitioned"]
