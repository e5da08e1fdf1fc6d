"""Result of a resolution: one complete DeepSpeed config with a reason for every leaf."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dstrain.config.facts import Facts
from dstrain.config.memory.placement import Buckets
from dstrain.config.optimizer_table import Build
from dstrain.config.resolution.batch import BatchUnit
from dstrain.config.resolution.rules.precision import short_name
from dstrain.config.resolution.tree import put


@dataclass(frozen=True)
class Provenance:
    """Origin of the value of a key.

    Attributes:
        source: "config", "argument", "derived" or "default" (an argument left at its default).
        detail: label of the config, name of the argument, or formula with numbers.
    """

    source: str
    detail: str

    def __str__(self) -> str:
        """Return the detail."""
        return self.detail


@dataclass(frozen=True)
class ResolvedConfig:
    """A complete DeepSpeed config, with the reason for every leaf.

    Attributes:
        values: leaf values by dotted path, in the order in which they are shown.
        provenance: reason for each leaf.
        adopted: arguments with values from the user's config.
        warnings: warnings; the config can be used despite them.
        facts: facts of the resolution.
        arguments: values of all arguments in the run; the micro-batch is that of one rank.
        batch_unit: unit of the batch sizes in the user's arguments.
        optimizer: implementation that runs; None for the user's optimizer.
    """

    values: Mapping[str, Any]
    provenance: Mapping[str, Provenance]
    adopted: Mapping[str, Any]
    warnings: tuple[str, ...]
    facts: Facts
    arguments: Mapping[str, Any] = field(repr=False)
    batch_unit: BatchUnit = BatchUnit()
    optimizer: Build | None = None

    def to_deepspeed(self) -> dict[str, Any]:
        """Return a new nested dict for ``deepspeed.initialize``.

        It has no section for an optimizer that dstrain builds and passes as an object.
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
        """Return the arguments of the optimizer's constructor, without the parameter groups."""
        prefix = "optimizer.params."
        given = {k: v for k, v in self.values.items() if k.startswith(prefix)}
        return {k.removeprefix(prefix): copy.deepcopy(v) for k, v in given.items()}

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
        """Return the format of matrix products: autocast's if that is on, else ``precision``."""
        if self.values.get("torch_autocast.enabled"):
            return short_name(self.values["torch_autocast.dtype"])
        return self.precision

    @property
    def has_scheduler(self) -> bool:
        """Tell whether the user's config has a schedule of DeepSpeed."""
        return "scheduler.type" in self.values

    @property
    def schedule_type(self) -> str:
        """Return the name of the schedule that runs unless the user has passed one."""
        return str(self.values.get("scheduler.type", self.arguments["lr_scheduler_type"]))

    @property
    def optimizer_type(self) -> str:
        """Return the name of the optimizer that runs unless the user has passed one."""
        return str(self.values.get("optimizer.type", self.arguments["optim"]))

    @property
    def learning_rate(self) -> float:
        """Return the learning rate that the schedule scales."""
        return float(self.arguments["learning_rate"])

    @property
    def weight_decay(self) -> float:
        """Return the weight decay of the parameter group that decays."""
        return float(self.arguments["weight_decay"])

    @property
    def optimizer_offload(self) -> str:
        """Return the place of optimizer states: "none" (the device), "cpu" or "nvme"."""
        return str(self.arguments["offload_optimizer"])

    @property
    def hpz_partition_size(self) -> int:
        """Return the ranks that share a secondary partition of the weights; 1 without one."""
        return int(self.values.get("zero_optimization.zero_hpz_partition_size", 1))

    @property
    def autocasts(self) -> bool:
        """Tell whether the engine runs the model under torch's autocast."""
        return bool(self.values.get("torch_autocast.enabled"))

    @property
    def buckets(self) -> Buckets:
        """Return the sizes of DeepSpeed's communication buffers."""
        return Buckets.of_config(self.values)

    @property
    def leaf_classes(self) -> tuple[str, ...]:
        """Return the classes whose modules stage 3 gathers whole; () leaves them to DeepSpeed."""
        names = self.values.get("zero_optimization.leaf_module.classes") or ()
        return (names,) if isinstance(names, str) else tuple(names)

    @property
    def user_leaf_modules(self) -> Sequence[str] | None:
        """Return the classes in the user's ``leaf_modules``, or None."""
        names: Sequence[str] | None = self.arguments["leaf_modules"]
        return names

    @property
    def broadcasts_buffers(self) -> bool:
        """Tell whether every rank runs with the main rank's buffers."""
        return self.arguments["ddp_broadcast_buffers"] is not False

    @property
    def timeout_seconds(self) -> float:
        """Return the longest time that a rank waits for other ranks."""
        return float(self.arguments["ddp_timeout"])

    @property
    def compilation(self) -> tuple[str, str | None] | None:
        """Return backend and mode of torch.compile; None if the model is not compiled."""
        if not self.arguments["torch_compile"]:
            return None
        return self.arguments["torch_compile_backend"], self.arguments["torch_compile_mode"]
