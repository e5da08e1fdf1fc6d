"""Arguments of a run as a user writes them: dataclasses that import no torch."""

from dstrain.arguments.sentence_transformer import SentenceTransformerTrainingArguments
from dstrain.arguments.seq2seq import Seq2SeqTrainingArguments
from dstrain.arguments.training_arguments import TrainingArguments

__all__ = [
    "Seq2SeqTrainingArguments",
    "SentenceTransformerTrainingArguments",
    "TrainingArguments",
]
