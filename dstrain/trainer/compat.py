"""Semi-private parts of transformers that this room uses, in one place."""

from transformers import GenerationConfig
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LabelSmoother, log_metrics, metrics_format
from transformers.trainer_utils import (
    EvalLoopOutput,
    PredictionOutput,
    TrainOutput,
    speed_metrics,
)
from transformers.utils import can_return_loss, logging

__all__ = [
    "EvalLoopOutput",
    "ExportableState",
    "LabelSmoother",
    "PredictionOutput",
    "TrainOutput",
    "can_return_loss",
    "is_as_loaded",
    "log_metrics",
    "logging",
    "mark_as_loaded",
    "metrics_format",
    "speed_metrics",
]


def is_as_loaded(config: GenerationConfig) -> bool:
    """Tell, by the rule of ``save_pretrained``, whether a generation config is as it was loaded."""
    return getattr(config, "_original_object_hash", None) == hash(config)


def mark_as_loaded(config: GenerationConfig) -> None:
    """Let a generation config, as it is now, count as loaded."""
    config._original_object_hash = hash(config)
