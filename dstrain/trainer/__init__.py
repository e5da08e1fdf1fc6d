"""The public Trainer, its assembly and its loop."""

from dstrain.trainer.build import partitioned
from dstrain.trainer.trainer import Trainer

__all__ = ["Trainer", "partitioned"]
