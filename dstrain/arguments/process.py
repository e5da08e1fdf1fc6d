"""Properties of this process: its rank and device, and its part in logging and writing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dstrain.arguments.compat import parallel_mode
from dstrain.arguments.reporting import ReportingArguments
from dstrain.arguments.run import RunArguments
from dstrain.arguments.saving import SavingArguments
from dstrain.core.log import LEVELS
from dstrain.core.main_first import main_first
from dstrain.core.ranks import launched_ranks

if TYPE_CHECKING:
    import torch


class Process(ReportingArguments, SavingArguments, RunArguments):
    """Properties of the arguments that depend on the process too."""

    @property
    def world_size(self) -> int:
        """Return the number of processes over all machines."""
        return launched_ranks().world_size

    @property
    def process_index(self) -> int:
        """Return the rank of this process among all."""
        return launched_ranks().rank

    @property
    def local_process_index(self) -> int:
        """Return the rank of this process on its machine."""
        return launched_ranks().local_rank

    @property
    def device(self) -> torch.device:
        """Return the device of this process."""
        import torch

        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        on_cpu = self.use_cpu or os.environ.get("DS_ACCELERATOR") == "cpu"
        if on_cpu or found is None or found.type == "mps":
            return torch.device("cpu")
        return torch.device(found.type, self.local_process_index)

    @property
    def _setup_devices(self) -> torch.device:
        """Return the device; scripts read this property of transformers to set the device up."""
        return self.device

    @property
    def n_gpu(self) -> int:
        """Return 1 if this process drives an accelerator, 0 on the CPU (no DataParallel)."""
        return 0 if self.device.type == "cpu" else 1

    @property
    def parallel_mode(self) -> Any:
        """Return transformers' ``ParallelMode``: DISTRIBUTED, or NOT_PARALLEL for one process."""
        return parallel_mode("DISTRIBUTED" if self.world_size > 1 else "NOT_PARALLEL")

    @property
    def place_model_on_device(self) -> bool:
        """Return False: the engine, not the trainer, moves the model to the device."""
        return False

    @property
    def ddp_timeout_delta(self) -> timedelta:
        """Return the time that a collective waits for a missing rank."""
        return timedelta(seconds=self.ddp_timeout)

    @property
    def should_log(self) -> bool:
        """Tell whether this process logs as a main process."""
        if self.log_on_each_node:
            return self.local_process_index == 0
        return self.process_index == 0

    @property
    def should_save(self) -> bool:
        """Tell whether this process writes files that are written once, or once per machine."""
        if self.save_on_each_node:
            return self.local_process_index == 0
        return self.process_index == 0

    @property
    def _no_sync_in_gradient_accumulation(self) -> bool:
        """Return False: DeepSpeed's engine decides when gradients are reduced."""
        return False

    def get_process_log_level(self) -> int:
        """Return the ``logging`` level of this process; passive is INFO on ranks that log."""
        name = self.log_level if self.should_log else self.log_level_replica
        return LEVELS.get(name, LEVELS["info"] if self.should_log else LEVELS["warning"])

    @contextlib.contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """Run the block on the main process first; other processes then find its cache.

        Args:
            local: let one process per machine run first; False is one process of all machines, for
                a shared disk.
            desc: description of the block.

        Raises:
            DstrainError: on a waiting process: the main process failed.
        """
        with main_first(launched_ranks(), per_node=local, what=desc):
            yield
