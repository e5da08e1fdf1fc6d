"""Reading, loading, capturing and restoring the state of an engine that trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dstrain.core.ranks import all_or_none
from dstrain.engine.buffers import Buffers
from dstrain.engine.state.layouts import locate_shards, optimized_names
from dstrain.engine.state.native import Unpickling, read_pickles, write_pickles
from dstrain.engine.state.optimizer_state import create_state, read_scalars
from dstrain.engine.state.progress import EngineProgress
from dstrain.engine.state.shards import WEIGHT, StateShard
from dstrain.engine.state.swapped import sub_group_in_memory


@dataclass(frozen=True)
class CapturedState:
    """A copy of an engine's state: this rank's shards, and the common values.

    Attributes:
        tensors: (parameter, start, key) -> values of a shard of this rank.
        scalars: single numbers of the optimizer's state, such as step counts, by parameter.
        progress: counters, loss scale, rates and schedule, which are equal on all ranks.
    """

    tensors: dict[tuple[str, int, str], torch.Tensor]
    scalars: dict[str, dict[str, Any]]
    progress: dict[str, Any]


class TrainingState:
    """Access to master weights, moments, counters, loss scale and schedule of one engine.

    Attributes:
        module: the model.
        buffers: tracker of the model's buffers that training changes.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        deepspeed_engine: Any,
        *,
        precision: str,
        buffers: Buffers,
        settle_weights: Callable[[], object],
    ) -> None:
        """Record schedule and parameter groups as they are before the first step.

        Args:
            module: the model.
            deepspeed_engine: the model's DeepSpeed engine.
            precision: number format of the run; only fp16 has a loss scale.
            buffers: tracker of the model's buffers.
            settle_weights: copies changes that a user's code has made to weights into the master
                weights; called before these are read.
        """
        self.module, self.buffers = module, buffers
        self._engine, self._settle_weights = deepspeed_engine, settle_weights
        self._precision = precision
        self._progress = EngineProgress(deepspeed_engine, precision=precision, buffers=buffers)

    # --- master weights and moments ---------------------------------------------------------------

    def shards(self) -> list[StateShard]:
        """Return this rank's shards, in the order of the module's parameters.

        Raises:
            CheckpointError: expert parallelism or an optimizer wrapper of unknown layout.
        """
        self._settle_weights()
        return locate_shards(self.module, self._engine.optimizer)

    def optimized_names(self) -> list[str]:
        """Return the names of all parameters that the optimizer updates, on any rank."""
        return optimized_names(self.module, self._engine.optimizer)

    @contextlib.contextmanager
    def loading(
        self, scalars: Mapping[str, Mapping[str, Any]] | None = None
    ) -> Iterator[list[StateShard]]:
        """Yield this rank's shards, to be written inside the block; a collective of all ranks.

        Before the block, parameters that stage 3 has gathered are partitioned, since their values
        would be stale. After it, the master weights are copied into the weights with which the
        model computes. An error in the block is raised on every rank; the model cannot be used
        then.

        Args:
            scalars: saved numbers of the optimizer's state; the state is created from them first.

        Raises:
            CheckpointError: the optimizer cannot have such state.
        """
        optimizer = self._engine.optimizer
        if hasattr(optimizer, "checkpoint_event_prologue"):
            optimizer.checkpoint_event_prologue()
        with all_or_none():
            shards = self.shards()
            if scalars is not None:
                create_state(shards, scalars)
            yield shards
        with torch.no_grad():
            _refresh_weights(optimizer)
        if hasattr(optimizer, "checkpoint_event_epilogue"):
            optimizer.checkpoint_event_epilogue()

    # --- counters, loss scale, parameter groups, schedule -----------------------------------------

    @property
    def optimizer_name(self) -> str:
        """Return the class name of the optimizer inside DeepSpeed's wrapper."""
        return self._progress.optimizer_name

    def learning_rates(self) -> list[float]:
        """Return the learning rate of each parameter group for the next step."""
        return [float(group["lr"]) for group in self._engine.optimizer.param_groups]

    def loss_scale(self) -> float | None:
        """Return the current loss scale; None without fp16."""
        return float(self._engine.optimizer.loss_scale) if self._precision == "fp16" else None

    def read_progress(self) -> dict[str, Any]:
        """Return ``EngineProgress.read``: the values that do not depend on the rank."""
        return self._progress.read()

    def restore_progress(self, saved: dict[str, Any]) -> None:
        """Restore what ``read_progress`` returned; a collective of all ranks."""
        self._progress.restore(saved)

    # --- the whole state --------------------------------------------------------------------------

    def capture(self) -> CapturedState:
        """Return a copy of the state in host memory; no rank waits for another.

        What is offloaded to a disk is copied on that disk.
        """
        shards = self.shards()
        tensors = {
            (shard.name, shard.start, key): shard.copied(key)
            for shard in shards
            for key in shard.tensor_keys()
            if key != WEIGHT
        }
        return CapturedState(tensors, read_scalars(shards), self.read_progress())

    def restore(self, captured: CapturedState) -> None:
        """Load captured state into a newly built engine; a collective of all ranks.

        The engine must have the same number of ranks and ZeRO stage as the captured one.
        """
        with self.loading(captured.scalars) as shards:
            for shard in shards:
                for key in shard.tensor_keys():
                    values = captured.tensors.get((shard.name, shard.start, key))
                    if values is not None:
                        shard.write(key, shard.start, values)
        self.restore_progress(captured.progress)

    def save_native(self, folder: Path, tag: str) -> None:
        """Write ``folder/tag`` as DeepSpeed's ``save_checkpoint`` does; a collective of all ranks.

        Raises:
            ModelError: a rank could not write; raised on every rank.
        """
        self._settle_weights()
        write_pickles(self._engine, folder, tag)

    def load_native(self, allowed: Unpickling) -> None:
        """Load DeepSpeed's files into a newly built engine; a collective of all ranks.

        Args:
            allowed: the permission to unpickle the files, which names them.

        Raises:
            CheckpointError: DeepSpeed does not find the files.
        """
        read_pickles(self._engine, allowed)


def _refresh_weights(optimizer: Any) -> None:
    """Copy master weights into the weights with which the model computes."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for index in range(len(optimizer.fp16_groups)):
            with sub_group_in_memory(optimizer, index):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups_flat"):
        for flat, group in zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True):
            parts = flat.split([p.numel() for p in group])
            for parameter, part in zip(group, parts, strict=True):
                parameter.data.copy_(part.view(parameter.shape))
    elif hasattr(optimizer, "fp32_groups"):
        for masters, group in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for parameter, master in zip(group, masters, strict=True):
                parameter.data.copy_(master)
