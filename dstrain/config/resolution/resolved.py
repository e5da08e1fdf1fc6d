"""The result of resolution: one frozen, complete DeepSpeed config with a reason for every leaf."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dstrain.config.facts import Facts
from dstrain.config.optimizer_table import Build
from dstrain.config.resolution.rules.precision import short_name
from dstrain.config.resolution.tree import put


@dataclass(frozen=True)
class Provenance:
    """The origin of the value of a key.

    Attributes:
        source: "config", "argument", "derived" or "default" (an argument left at its default).
        detail: one line: the config's label, the argument's name, or the formula with numbers.
    """

    source: str
    detail: str

    def __str__(self) -> str:
        """Return the detail, which reads alone."""
        return self.detail


@dataclass(frozen=True)
class ResolvedConfig:
    """A complete DeepSpeed config, with the reason for every leaf.

    Attributes:
        values: leaf values by dotted path, in the order in which they are shown.
        provenance: the reason for each leaf.
        adopted: arguments that took their value from the user's config.
        warnings: what the user should know but need not change.
        facts: what the resolution knew.
        arguments: the arguments after adoption.
        optimizer: what runs, unless it is the user's own.
    """

    values: Mapping[str, Any]
    provenance: Mapping[str, Provenance]
    adopted: Mapping[str, Any]
    warnings: tuple[str, ...]
    facts: Facts
    arguments: Mapping[str, Any] = field(repr=False)
    optimizer: Build | None = None

    def to_deepspeed(self) -> dict[str, Any]:
        """Return a nested dict of its own, ready for ``deepspeed.initialize``.

        Without the section of an optimizer that dstrain builds, which is passed as an object.
        """
        nested: dict[str, Any] = {}
        for path, value in self.values.items():
            if not (self.builds_optimizer and path.startswith("optimizer.")):
                put(nested, path, copy.deepcopy(value))
        return nested

    @property
    def builds_optimizer(self) -> bool:
        """Tell whether dstrain builds the optimizer, since DeepSpeed has no name for it."""
        return self.optimizer is not None and not self.optimizer.type

    def optimizer_parameters(self) -> dict[str, Any]:
        """Return the arguments of the optimizer's constructor, beside the parameter groups."""
        prefix = "optimizer.params."
        given = {k: v for k, v in self.values.items() if k.startswith(prefix)}
        return {k.removeprefix(prefix): copy.deepcopy(v) for k, v in given.items()}

    def value(self, argument: str) -> Any:
        """Return the value of an argument that the run uses, after the user's config."""
        return self.arguments[argument]

    @property
    def stage(self) -> int:
        """Return the ZeRO stage, 0 to 3."""
        return int(self.values["zero_optimization.stage"])

    @property
    def micro_batch_size(self) -> int:
        """Return the samples per rank in one forward pass."""
        return int(self.values["train_micro_batch_size_per_gpu"])

    @property
    def accumulation(self) -> int:
        """Return the micro-batches per rank in a full optimizer step."""
        return int(self.values["gradient_accumulation_steps"])

    @property
    def global_batch_size(self) -> int:
        """Return the samples over all ranks in a full optimizer step."""
        return int(self.values["train_batch_size"])

    @property
    def precision(self) -> str:
        """Return the format of weights and activations: "bf16", "fp16" or "fp32"."""
        for name in ("bf16", "fp16"):
            if self.values.get(f"{name}.enabled"):
                return name
        return "fp32"

    @property
    def compute_format(self) -> str:
        """Return the format of matrix products: autocast's where it is on, else ``precision``."""
        if self.values.get("torch_autocast.enabled"):
            return short_name(self.values["torch_autocast.dtype"])
        return self.precision

    @property
    def has_scheduler(self) -> bool:
        """Tell whether the user's config asks for one of DeepSpeed's own schedules."""
        return "scheduler.type" in self.values
