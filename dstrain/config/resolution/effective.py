"""Effective config: the value that DeepSpeed uses for each key, also its default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.config import schema
from dstrain.config.facts import Facts
from dstrain.config.resolution.tree import has

ZERO = "zero_optimization"


@dataclass(frozen=True)
class EffectiveConfig:
    """A filled config that returns DeepSpeed's default for a key without a value.

    Attributes:
        values: leaf values by dotted path.
        facts: facts about ranks, machines and the model.
        label: name of the user's config in messages.
    """

    values: Mapping[str, Any]
    facts: Facts
    label: str

    def get(self, path: str) -> Any:
        """Return the value at a path, or DeepSpeed's default."""
        if path in self.values:
            return self.values[path]
        default = schema.default_of(path)
        return None if default is schema.NO_DEFAULT else default

    def zero(self, name: str) -> Any:
        """Return the value of a key of ``zero_optimization``."""
        return self.get(f"{ZERO}.{name}")

    @property
    def stage(self) -> int:
        """Return the ZeRO stage."""
        return int(self.zero("stage"))

    @property
    def precision(self) -> str:
        """Return the format of weights: "bf16", "fp16" or "fp32"."""
        return next((name for name in ("bf16", "fp16") if self.get(f"{name}.enabled")), "fp32")

    def device(self, name: str) -> str:
        """Return the device of ``offload_optimizer`` or ``offload_param``, or "none"."""
        return str(self.zero(f"{name}.device") or "none")

    def has(self, section: str) -> bool:
        """Tell whether anything is set in a section."""
        return has(self.values, section)
