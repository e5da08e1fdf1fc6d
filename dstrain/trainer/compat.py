"""Semi-private parts of transformers that this room uses, in one place."""

from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import log_metrics, metrics_format, save_metrics
from transformers.trainer_utils import (
    EvalLoopOutput,
    PredictionOutput,
    TrainOutput,
    speed_metrics,
)

__all__ = [
    "EvalLoopOutput",
    "ExportableState",
    "PredictionOutput",
    "TrainOutput",
    "log_metrics",
    "metrics_format",
    "save_metrics",
    "speed_metrics",
]
