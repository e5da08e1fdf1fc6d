"""Config: one complete DeepSpeed config from arguments and facts, with a reason for every key."""

from dstrain.config.facts import Facts, Machine, ModelFacts
from dstrain.config.resolution.resolve import resolve
from dstrain.config.resolution.resolved import Provenance, ResolvedConfig

__all__ = ["Facts", "Machine", "ModelFacts", "Provenance", "ResolvedConfig", "resolve"]
