"""Semi-private parts of transformers that this room uses, in one place."""

from transformers.debug_utils import DebugUnderflowOverflow
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import log_metrics, metrics_format, save_metrics
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
from transformers.utils import logging

__all__ = [
    "BestRun",
    "EvalLoopOutput",
    "DebugUnderflowOverflow",
    "ExportableState",
    "PredictionOutput",
    "TrainOutput",
    "apply_liger_kernel",
    "default_hp_space_optuna",
    "default_hp_space_ray",
    "default_hp_space_wandb",
    "log_metrics",
    "logging",
    "metrics_format",
    "save_metrics",
    "speed_metrics",
]
