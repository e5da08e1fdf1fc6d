"""Effective config: the value that DeepSpeed uses at any key, its own default included."""

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
    """A filled config in which every key has a value: where it has none, DeepSpeed's default.

    Attributes:
        values: leaf values by dotted path.
        facts: world size, device and so on.
        label: where the user's config came from.
    """

    values: Mapping[str, Any]
    facts: Facts
    label: str

    def get(self, path: str) -> Any:
        """Return the value at a path, DeepSpeed's default where there is none."""
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
        """Return where ``offload_optimizer`` or ``offload_param`` puts things, or "none"."""
        return str(self.zero(f"{name}.device") or "none")

    def has(self, section: str) -> bool:
        """Tell whether anything is set in a section."""
        return has(self.values, section)
