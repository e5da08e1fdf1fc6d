"""The forward and backward passes of a training, in the same order on all ranks."""

from dstrain.engine.stepping.gradient_sequence import gradient_sequence
from dstrain.engine.stepping.module_order import Lockstep
from dstrain.engine.stepping.stage_zero import repair_if_needed
from dstrain.engine.stepping.training_passes import OwnPasses, no_second_gradient

__all__ = [
    "Lockstep",
    "OwnPasses",
    "gradient_sequence",
    "no_second_gradient",
    "repair_if_needed",
]
