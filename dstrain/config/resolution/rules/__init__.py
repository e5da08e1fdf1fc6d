"""Rules, each for one key of the DeepSpeed config: they derive its value.

There is a module for each subject. Keys are filled and shown in the order of the rules: a rule may
read the values of rules before it.
"""

from dstrain.config.resolution.rules import (
    communication,
    offload,
    optimizer,
    precision,
    scheduler,
    sizes,
    training,
    zero,
)
from dstrain.config.resolution.rules.rule import (
    Binding,
    Derivation,
    Derived,
    View,
    readable_arguments,
)
from dstrain.config.resolution.rules.scheduler import SCHEDULES

RULES: tuple[Binding | Derivation, ...] = (
    *zero.RULES,
    *offload.RULES,
    *precision.RULES,
    *training.RULES,
    *optimizer.RULES,
    *scheduler.RULES,
    *sizes.RULES,
    *communication.RULES,
)

__all__ = [
    "RULES",
    "SCHEDULES",
    "Binding",
    "Derivation",
    "Derived",
    "View",
    "readable_arguments",
]
