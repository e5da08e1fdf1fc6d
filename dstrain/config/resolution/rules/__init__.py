"""Rules: each owns named keys of the DeepSpeed config and says where their values come from.

One module per subject. Their order is that in which keys are filled and shown: a rule may read what
those before it have written.
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
