"""Facts about the world and the model that the resolver needs; nothing imports torch."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from dstrain.config.memory.sizes import ModelFacts, ModelSizes


@dataclass(frozen=True)
class Machine:
    """Memory and disk of a machine, shared by its ranks; the least over all machines.

    Attributes:
        ranks: ranks that share one machine.
        device_bytes: memory of one accelerator; where ranks train on the CPU, one rank's share of
            the host's.
        host_bytes: host memory of one machine; None where it is not known.
        nvme_bytes: free local disk of one machine; None where there is none or it is not known.
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
        user_optimizer: the user brings an optimizer: an object, or a method that makes it.
        user_scheduler: the user brings a schedule: an object, or a method that makes it.
        sizes: every parameter and the form of the layers, which the memory plan needs.
        machine: memory and disk.
        sequence_length: tokens of one sample, where the task knows them.
        partitioned: the model exists and its parameters are partitioned already (ZeRO stage 3).
        expert_blocks: classes of the model's blocks whose experts are modules of their own.
        is_transformers: the model is one of transformers.
        packages: optional packages of optimizers that can be imported.
        found_batch: micro-batch and accumulation that ``auto_find_batch_size`` found, in the units
            of the arguments; they run in the place of the arguments' values.
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
        """Return the ranks on one machine, the most on any; None if the machine is not known."""
        return None if self.machine is None else self.machine.ranks
