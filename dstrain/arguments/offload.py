"""Arguments about offload of optimizer and parameters to host memory or disk."""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.arguments.fields import arg
from dstrain.arguments.treatment import deepspeed_key, implemented, refused
from dstrain.core.errors import Problem
from dstrain.core.files import check_utf8

OFFLOAD_DEVICES = ("none", "cpu", "nvme", "auto")


@dataclass
class OffloadArguments:
    """Offload: places of optimizer and parameters between uses."""

    offload_optimizer: str = arg(
        "none",
        "Place of optimizer states and master weights: the accelerator (none), host memory (cpu; "
        "stages 1 to 3) or a local disk (nvme; stage 3, needs nvme_path). Saves 12 "
        "bytes per parameter of a rank's share; the update then runs on host cores, and gradients "
        "and weights cross the bus once per step. auto leaves the choice to the memory plan.",
        choices=OFFLOAD_DEVICES,
        treatment=deepspeed_key(
            "zero_optimization.offload_optimizer.device",
            note="auto is what the memory plan chooses, none where it cannot be made",
            own=True,
        ),
    )
    offload_param: str = arg(
        "none",
        "Place of parameter partitions between uses, stage 3 only: the accelerator (none), host "
        "memory (cpu) or a local disk (nvme, needs nvme_path). Saves 2 bytes per "
        "parameter of a rank's share; parameters cross the bus in forward and again in backward. "
        "auto leaves the choice to the memory plan.",
        choices=OFFLOAD_DEVICES,
        treatment=deepspeed_key(
            "zero_optimization.offload_param.device",
            note="auto is what the memory plan chooses, none where it cannot be made",
            own=True,
        ),
    )
    nvme_path: str | None = arg(
        None,
        "An existing folder on a fast local disk, on every machine, for what is offloaded to nvme. "
        "The optimizer takes 12 bytes per parameter of the machine's share there, parameters 2. "
        "Needs DeepSpeed's async_io op, and libaio with its headers to build it.",
        treatment=implemented(
            "`nvme_path` of `offload_optimizer` and `offload_param` in the DeepSpeed config, where "
            "their device is nvme",
            own=True,
        ),
    )
    super_offload: bool = arg(
        False,
        "SuperOffload: the offloaded update starts while backward still runs, in a process of its "
        "own, and can be rolled back. For machines whose host and accelerator share a fast bus "
        "(NVIDIA Grace); elsewhere plain offload does as well. Needs stage 3, "
        "offload_optimizer=cpu and CUDA.",
        treatment=deepspeed_key("zero_optimization.offload_optimizer.super_offload", own=True),
    )
    zenflow: bool = arg(
        False,
        "ZenFlow: under optimizer offload, update the most important gradients on the accelerator "
        "at once and the others on the host some steps later.",
        treatment=refused(
            "in DeepSpeed 0.19.8 the gradients that it applies at once are not clipped, its "
            "optimizer gives biases and norms the weight decay of matrices (stages 1 and 2), it "
            "overwrites fp32 master weights by the 16-bit ones, and it replaces gradient "
            "accumulation by an interval of its own: none of that is what the arguments ask for",
            "use offload_optimizer=cpu without it",
            own=True,
        ),
    )

    def _offload_problems(self, zero_stage: str) -> list[Problem]:
        problems = check_utf8("nvme_path", self.nvme_path)
        if self.offload_param in ("cpu", "nvme") and zero_stage in ("0", "1", "2"):
            problems.append(
                Problem(
                    f"offload_param={self.offload_param!r} with zero_stage={zero_stage}",
                    "only stage 3 partitions parameters, so only there they can be offloaded",
                    "set zero_stage to 3, or offload_param to none",
                )
            )
        if self.offload_optimizer in ("cpu", "nvme") and zero_stage == "0":
            problems.append(
                Problem(
                    f"offload_optimizer={self.offload_optimizer!r} with zero_stage=0",
                    "stage 0 does not partition the optimizer, so it cannot offload it",
                    "set zero_stage to 1, 2 or 3, or offload_optimizer to none",
                )
            )
        return problems
