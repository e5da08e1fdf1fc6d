"""Inputs of the memory model: ZeRO stage and offloads, sizes of buckets, a workload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.config import optimizers
from dstrain.core.errors import ConfigError, Problem

FP32 = 4
WIDTHS = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Placement:
    """ZeRO stage, and places of optimizer and parameters between their uses.

    Attributes:
        stage: 0 to 3.
        optimizer: place of master weights and optimizer states: "none" (the accelerator), "cpu" or
            "nvme".
        parameters: place of parameters: "none", or at stage 3 also "cpu" or "nvme".
    """

    stage: int
    optimizer: str = "none"
    parameters: str = "none"

    def __str__(self) -> str:
        """Return the placement in words, for tables and reasons."""
        places = {"optimizer": self.optimizer, "parameters": self.parameters}
        moved = [f"{name} on {place}" for name, place in places.items() if place != "none"]
        return ", ".join([f"stage {self.stage}", *moved])

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments of training for this placement."""
        return {
            "zero_stage": str(self.stage),
            "offload_optimizer": self.optimizer,
            "offload_param": self.parameters,
        }


@dataclass(frozen=True)
class Buckets:
    """Sizes of DeepSpeed's buffers, in elements, with the defaults of DeepSpeed.

    Attributes:
        reduce: ``reduce_bucket_size``.
        prefetch: ``stage3_prefetch_bucket_size``.
        persistence: ``stage3_param_persistence_threshold``.
        max_live: ``stage3_max_live_parameters``.
        max_reuse: ``stage3_max_reuse_distance``.
        sub_group: ``sub_group_size``.
        overlap: ``overlap_comm``, which doubles the bucket at stages 1 and 2.
    """

    reduce: int = 500_000_000
    prefetch: int = 50_000_000
    persistence: int = 100_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    overlap: bool = False

    @staticmethod
    def of_config(values: Mapping[str, Any], usual: Buckets | None = None) -> Buckets:
        """Return the sizes in a config.

        Args:
            values: leaf values by dotted path.
            usual: sizes for keys that the config leaves out; by default those of DeepSpeed.
        """
        usual = usual or Buckets()

        def size(name: str, default: int) -> int:
            return int(values.get(f"zero_optimization.{name}", default))

        return Buckets(
            reduce=size("reduce_bucket_size", usual.reduce),
            prefetch=size("stage3_prefetch_bucket_size", usual.prefetch),
            persistence=size("stage3_param_persistence_threshold", usual.persistence),
            max_live=size("stage3_max_live_parameters", usual.max_live),
            max_reuse=size("stage3_max_reuse_distance", usual.max_reuse),
            sub_group=size("sub_group_size", usual.sub_group),
            overlap=bool(values.get("zero_optimization.overlap_comm", usual.overlap)),
        )


@dataclass(frozen=True)
class Work:
    """Settings of a training on which the size of its states depends.

    Attributes:
        world_size: ranks over all machines.
        ranks_per_machine: ranks that share host memory and disks.
        precision: "bf16", "fp16" or "fp32".
        accumulation: micro-batches per optimizer step.
        optimizer: a value of the argument ``optim``, or "adamw" or "sgd_momentum".
        adam_temporary: the optimizer is torch's own AdamW, not a fused kernel.
        device: "cuda" or "cpu".
        master_width: bytes per master weight, and per gradient that updates it; 2 with
            ``bf16_master_weights_and_grads``.
        narrow_states: optimizer states are as narrow as master weights, by
            ``bf16_optimizer_states``.
    """

    world_size: int
    ranks_per_machine: int = 8
    precision: str = "bf16"
    accumulation: int = 1
    optimizer: str = "adamw"
    adam_temporary: bool = True
    device: str = "cuda"
    master_width: int = FP32
    narrow_states: bool = False

    @property
    def width(self) -> int:
        """Return the bytes per value of the training format."""
        return WIDTHS[self.precision]

    def sums_in_fp32(self, stage: int) -> bool:
        """Tell whether gradients of micro-batches are added up in fp32 in 16-bit training.

        That is so by default (``grad_accum_dtype``, ``rules/precision.py``).
        """
        return self.precision == "bf16" and self.accumulation > 1 and stage >= 2

    def sum_width(self, stage: int) -> int:
        """Return the bytes per gradient that is kept from one micro-batch to the next."""
        return FP32 if self.sums_in_fp32(stage) else self.width

    def state_bytes(self, placement: Placement) -> float:
        """Return bytes of optimizer state per parameter; sources are in ``optimizer_table.py``."""
        in_fp32 = optimizers.state_bytes(
            self.optimizer,
            stage=placement.stage,
            offload=placement.optimizer,
            device=self.device,
        )
        return in_fp32 * self.master_width / FP32 if self.narrow_states else in_fp32


UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_size(text: str, name: str = "size") -> int:
    """Return the bytes of "80GB", "1.5 TB" (powers of ten) or "640GiB" (powers of two).

    Raises:
        ConfigError: the text is no number with such a unit, or less than one byte.
    """
    word = text.strip().upper()
    digits = word.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = word[len(digits) :].strip()
    try:
        value = float(digits) * UNITS[unit]
    except (ValueError, KeyError):
        value = 0.0
    if not 1 <= value < float("inf"):
        raise ConfigError(
            Problem(
                f"--{name} {text!r}",
                "it is a number with a unit: KB, MB, GB, TB, or KiB, MiB, GiB, TiB",
                f"for example --{name} 80GB",
            )
        )
    return int(value)
