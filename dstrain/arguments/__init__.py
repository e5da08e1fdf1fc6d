"""Arguments of a run, as dataclasses for the user; without torch."""

from dstrain.arguments.sentence_transformer import SentenceTransformerTrainingArguments
from dstrain.arguments.seq2seq import Seq2SeqTrainingArguments
from dstrain.arguments.training_arguments import TrainingArguments

__all__ = [
    "Seq2SeqTrainingArguments",
    "SentenceTransformerTrainingArguments",
    "TrainingArguments",
]
