"""Train large transformer models with DeepSpeed: familiar arguments, nothing silent.

Names are loaded when they are first used: ``import dstrain`` costs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dstrain.arguments import (
        SentenceTransformerTrainingArguments,
        Seq2SeqTrainingArguments,
        TrainingArguments,
    )
    from dstrain.trainer import Seq2SeqTrainer, Trainer, partitioned

_HOMES = {
    "TrainingArguments": "dstrain.arguments",
    "Seq2SeqTrainingArguments": "dstrain.arguments",
    "SentenceTransformerTrainingArguments": "dstrain.arguments",
    "Seq2SeqTrainer": "dstrain.trainer",
    "Trainer": "dstrain.trainer",
    "partitioned": "dstrain.trainer",
}

__all__ = [
    "Seq2SeqTrainer",
    "Seq2SeqTrainingArguments",
    "SentenceTransformerTrainingArguments",
    "Trainer",
    "TrainingArguments",
    "__version__",
    "partitioned",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its room."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dstrain' has no attribute {name!r}")
    import importlib

    from dstrain.core.launcher import watch_launchers_of_rank

    watch_launchers_of_rank()
    if _HOMES[name] == "dstrain.trainer":  # libraries that it loads may print
        from dstrain.core.output import drop_what_cannot_be_written

        drop_what_cannot_be_written()
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Public names, for completion."""
    return sorted(__all__)
