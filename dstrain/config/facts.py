"""Facts about ranks, machines and the model that a resolution needs; without torch."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from dstrain.config.memory.sizes import ModelFacts, ModelSizes


@dataclass(frozen=True)
class Machine:
    """Memory and disk of a machine, shared by its ranks: the least of all machines.

    Attributes:
        ranks: ranks on one machine.
        device_bytes: memory of one accelerator; for ranks that train on the CPU, one rank's share
            of the host memory.
        host_bytes: host memory of one machine; None if it is not known.
        nvme_bytes: free local disk of one machine; None without one, or if it is not known.
    """

    ranks: int
    device_bytes: int
    host_bytes: int | None = None
    nvme_bytes: int | None = None


@dataclass(frozen=True)
class Facts:
    """Facts that are known when a config is resolved; None stands for "not known yet".

    Attributes:
        world_size: ranks over all machines.
        device: "cpu", "cuda" or another torch device type.
        num_training_steps: optimizer steps of the run.
        model: sizes of the parameters.
        user_optimizer: the user has passed an optimizer, or overrides the method that creates it.
        user_scheduler: the user has passed a schedule, or overrides the method that creates it.
        sizes: every parameter and the form of the layers, which the memory plan needs.
        machine: memory and disk.
        sequence_length: tokens of one sample, if the task knows them.
        partitioned: the model is built, and its parameters are partitioned (ZeRO stage 3).
        expert_blocks: classes of blocks of the model in which each expert is a separate module.
        is_transformers: the model is one of transformers.
        packages: optional packages of optimizers that can be imported.
        found_batch: micro-batch and accumulation that ``auto_find_batch_size`` found, in the units
            of the arguments; they replace the values of the arguments.
    """

    world_size: int = 1
    device: str = "cuda"
    num_training_steps: int | None = None
    model: ModelFacts | None = None
    user_optimizer: bool = False
    user_scheduler: bool = False
    sizes: ModelSizes | None = None
    machine: Machine | None = None
    sequence_length: int | None = None
    partitioned: bool = False
    expert_blocks: tuple[str, ...] = ()
    is_transformers: bool = False
    packages: Set[str] | None = None
    found_batch: tuple[int, int] | None = None

    @property
    def ranks_per_machine(self) -> int | None:
        """Return the most ranks on one machine; None if the machine is not known."""
        return None if self.machine is None else self.machine.ranks
