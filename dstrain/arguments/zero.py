"""Arguments about DeepSpeed: the user's config and the ZeRO choices that need no JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dstrain.arguments.fields import arg
from dstrain.arguments.treatment import deepspeed_key, implemented
from dstrain.core.errors import Problem

OFFLOAD_DEVICES = ("none", "cpu")


@dataclass
class ZeroArguments:
    """What ZeRO partitions and where it keeps it."""

    deepspeed: dict[str, Any] | str | None = arg(
        None,
        "DeepSpeed config: a preset name (zero1, zero2, zero2_offload, zero3, ...), the path of a "
        'JSON file, a JSON string, a dict, or none. Keys that are missing or "auto" are filled '
        "from these arguments; a key with a value of its own wins over an argument left at its "
        "default, and conflicts with one that was changed.",
        treatment=implemented("none takes the arguments alone"),
    )
    zero_stage: str = arg(
        "auto",
        "What ZeRO partitions over the ranks: 0 nothing, 1 optimizer states, 2 also gradients, "
        "3 also parameters; auto takes the fastest that fits by the memory plan (`dstrain plan`), "
        "and 2 where the model's sizes or the memory are not known.",
        choices=("auto", "0", "1", "2", "3"),
        treatment=deepspeed_key("zero_optimization.stage", own=True),
    )
    offload_optimizer: str = arg(
        "none",
        "Where optimizer states and master weights live: on the accelerator (none) or in host "
        "memory (cpu; stages 1 to 3).",
        choices=OFFLOAD_DEVICES,
        treatment=deepspeed_key("zero_optimization.offload_optimizer.device", own=True),
    )
    offload_param: str = arg(
        "none",
        "Where parameter partitions live between uses: on the accelerator (none) or in host "
        "memory (cpu; stage 3 only).",
        choices=OFFLOAD_DEVICES,
        treatment=deepspeed_key("zero_optimization.offload_param.device", own=True),
    )

    def _zero_problems(self) -> list[Problem]:
        problems = []
        if self.offload_param != "none" and self.zero_stage in ("0", "1", "2"):
            problems.append(
                Problem(
                    f"offload_param={self.offload_param!r} with zero_stage={self.zero_stage}",
                    "only stage 3 partitions parameters, so only there they can be offloaded",
                    "set zero_stage to 3, or offload_param to none",
                )
            )
        if self.offload_optimizer != "none" and self.zero_stage == "0":
            problems.append(
                Problem(
                    f"offload_optimizer={self.offload_optimizer!r} with zero_stage=0",
                    "stage 0 does not partition the optimizer, so it cannot offload it",
                    "set zero_stage to 1, 2 or 3, or offload_optimizer to none",
                )
            )
        return problems
