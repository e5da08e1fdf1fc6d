"""Semi-private parts of transformers that this room uses, in one place."""

from typing import Any

from transformers.debug_utils import DebugUnderflowOverflow
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LabelSmoother, log_metrics, metrics_format
from transformers.trainer_utils import (
    BestRun,
    EvalLoopOutput,
    PredictionOutput,
    TrainOutput,
    default_hp_space_optuna,
    default_hp_space_ray,
    default_hp_space_wandb,
    speed_metrics,
)
from transformers.utils import can_return_loss, logging

__all__ = [
    "BestRun",
    "EvalLoopOutput",
    "DebugUnderflowOverflow",
    "ExportableState",
    "LabelSmoother",
    "PredictionOutput",
    "TrainOutput",
    "apply_liger_kernel",
    "can_return_loss",
    "default_hp_space_optuna",
    "default_hp_space_ray",
    "default_hp_space_wandb",
    "is_as_loaded",
    "log_metrics",
    "logging",
    "mark_as_loaded",
    "metrics_format",
    "speed_metrics",
]


def is_as_loaded(config: Any) -> bool:
    """Tell, by the rule of ``save_pretrained``, whether a generation config is as it was loaded."""
    return getattr(config, "_original_object_hash", None) == hash(config)


def mark_as_loaded(config: Any) -> None:
    """Let a generation config, as it is now, count as loaded."""
    config._original_object_hash = hash(config)
