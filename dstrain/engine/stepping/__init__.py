"""Backward passes and gradients of a training, in the same order on all ranks."""

from dstrain.engine.stepping.gradient_clipping import GradientClipping
from dstrain.engine.stepping.gradient_order import gradient_sequence
from dstrain.engine.stepping.module_order import ModuleOrderWatch
from dstrain.engine.stepping.stage_zero import stage_zero_correction
from dstrain.engine.stepping.training_passes import TrainingPasses, no_second_gradient

__all__ = [
    "GradientClipping",
    "ModuleOrderWatch",
    "TrainingPasses",
    "gradient_sequence",
    "no_second_gradient",
    "stage_zero_correction",
]
