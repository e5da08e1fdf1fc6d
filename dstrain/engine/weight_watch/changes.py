"""Copying of weights that a user's code changes in place into the master weights.

DeepSpeed updates master weights and copies them over the model's weights in every optimizer step.
Without this module, that would undo a change which the model makes in its forward pass (clamped
weights) or which a callback makes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from dstrain.core.errors import CheckpointError, Problem, TrainingError
from dstrain.engine import compat
from dstrain.engine.state import MASTER, StateShard, locate_shards
from dstrain.engine.weight_watch.watch import WeightWatch
from dstrain.engine.zero import (
    has_scalars,
    is_gathered,
    is_partitioned,
    scalars_as_bytes,
    updated_rank_partition,
)


class WeightChanges:
    """Copies changed weights into the master weights, each rank into the shards that it has.

    No rank waits for another, and none for its device, unless master weights are offloaded. The
    moments of the optimizer stay as they are. Where the value in the model equals the rounded
    master weight, the master weight keeps its full precision. This includes elements that were
    changed and changed back before the next step, as when averaged weights replace the weights
    during an evaluation.

    Attributes:
        knows_step: whether to stop watching forward passes: either the first optimizer step has
            shown which weights they change, or a compiled forward pass cannot be watched.
    """

    def __init__(self, module: torch.nn.Module, optimizer: Any, *, stage: int) -> None:
        """Prepare to watch the weights of a model that an engine trains.

        Args:
            module: the model, on its device.
            optimizer: DeepSpeed's wrapper of the optimizer, which has the master weights.
            stage: the ZeRO stage.
        """
        self._module, self._optimizer = module, optimizer
        self._watch = WeightWatch(module, on_change=self._note)
        self._in_step = False
        self._shards: dict[int, list[StateShard]] | None = None
        self._repeated: dict[int, Any] = {}
        self._hooks: list[Any] = []
        # DeepSpeed's GatheredParameters cannot send parameters of shape ().
        self._has_scalars = stage == 3 and has_scalars(module.parameters())
        self.knows_step = compat.is_compiled(module)

    @contextlib.contextmanager
    def in_callbacks(self) -> Iterator[None]:
        """Watch callbacks in the block; the weights that they change are copied later.

        The copy is made when master weights are used next.

        Raises:
            TrainingError: a callback changes a partitioned parameter that is not gathered, or
                whose partition cannot be updated.
        """
        with scalars_as_bytes(wanted=self._has_scalars), self._watch.watching("a callback"):
            yield
        for parameter in self._watch.changed.values():
            if is_partitioned(parameter):
                _updated_partition(parameter)  # before it is partitioned again

    @contextlib.contextmanager
    def in_training_step(self) -> Iterator[None]:
        """Watch the forward and backward pass in the block, until the first optimizer step.

        Weights that are changed in these passes are assumed to change in every later one too, and
        are copied before each optimizer step.

        Raises:
            TrainingError: a partitioned parameter is changed.
        """
        if self.knows_step:
            yield
            return
        self._in_step = True
        try:
            with self._watch.watching("the forward pass"):
                yield
        finally:
            self._in_step = False
        self._repeated.update(self._watch.changed)
        self._watch.changed.clear()

    def before_step(self) -> None:
        """Copy the weights that callbacks or forward passes have changed, before the step."""
        self.knows_step = True
        self._watch.changed.update(self._repeated)
        for key, before in self._watch.replaced.items():
            _put_back(self._watch.changed[key], before)
        self._watch.replaced.clear()
        self.update_master_weights()

    @torch.no_grad()
    def update_master_weights(self) -> None:
        """Copy the weights that were changed since the last call into the master weights.

        Raises:
            TrainingError: the master weights cannot be reached.
        """
        changed = list(self._watch.changed.values())
        self._watch.changed.clear()
        shards = self._shards_by_parameter() if changed else {}
        for parameter in changed:
            share = _updated_partition(parameter) if is_partitioned(parameter) else None
            for shard in shards.get(id(parameter), ()):
                if shard.optimizer is None or shard.holder is parameter:
                    continue
                if share is None and tuple(parameter.shape) != shard.shape:
                    raise _reshaped(shard, parameter)
                if share is None:
                    values = parameter.detach().reshape(-1)[shard.start : shard.stop]
                else:
                    values = share[: shard.numel]
                _update_master(shard, values)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _note(self, parameter: Any) -> None:
        """Keep, at stage 3, changes that the forward pass makes to a gathered parameter.

        Adds a hook that copies the changed values into this rank's partition before DeepSpeed
        discards the gathered ones, so that the gather of the backward pass finds them.
        """
        if not self._in_step or not is_partitioned(parameter) or id(parameter) in self._repeated:
            return

        def keep(*_: object) -> None:
            if is_gathered(parameter):
                _updated_partition(parameter)

        for part in self._module.modules():
            if any(candidate is parameter for candidate in part._parameters.values()):
                # Runs before DeepSpeed's hook, which discards the gathered values.
                self._hooks.append(part.register_forward_hook(keep, prepend=True))

    def _shards_by_parameter(self) -> dict[int, list[StateShard]]:
        """Return this rank's shards by the ``id`` of their parameter.

        They are located at the first call only, since they stay in place.

        Raises:
            TrainingError: the master weights cannot be reached.
        """
        if self._shards is None:
            parameters = dict(self._module.named_parameters())
            self._shards = {}
            try:
                for shard in locate_shards(self._module, self._optimizer):
                    parameter = parameters[shard.name]
                    self._shards.setdefault(id(parameter), []).append(shard)
            except CheckpointError as error:
                raise TrainingError(
                    Problem(
                        "weights are changed in place during training",
                        "they cannot be taken over into the master weights, which would undo the "
                        f"change in the next step: {error}",
                        "keep master weights on the device or the host, without experts of "
                        "DeepSpeed's, or leave the weights as they are",
                    )
                ) from error
        return self._shards


@torch.no_grad()
def _put_back(parameter: Any, before: torch.Tensor) -> None:
    """Copy the new values of a parameter whose ``.data`` was replaced into its former memory.

    That memory is part of one of DeepSpeed's flat tensors, which the optimizer step updates.
    Changes nothing where the new tensor has another shape, format or device.
    """
    fits = before.dtype == parameter.dtype and before.device == parameter.device
    if before.data_ptr() != parameter.data_ptr() and fits and before.shape == parameter.shape:
        before.copy_(parameter)
        parameter.data = before


def _updated_partition(parameter: Any) -> torch.Tensor:
    """Return this rank's partition of a parameter, updated first if the parameter is gathered.

    Raises:
        TrainingError: partitions are quantised, spread over a group of ranks, or on a disk.
    """
    share = updated_rank_partition(parameter)
    if share is None:
        raise TrainingError(
            Problem(
                "weights are changed in place during training",
                "at ZeRO stage 3 with quantised weights, groups of ranks, or weights on NVMe, they "
                "cannot be taken over",
                "leave these options out, or set zero_stage to 2",
            )
        )
    return share


def _reshaped(shard: StateShard, parameter: torch.Tensor) -> TrainingError:
    """Return the error for a parameter whose shape has changed during training."""
    return TrainingError(
        Problem(
            f"{shard.name} of shape {shard.shape} has the shape {tuple(parameter.shape)} now",
            "the optimizer was built for the shape that it had when train() began",
            "change the shape of weights before train()",
        )
    )


def _update_master(shard: StateShard, values: torch.Tensor) -> None:
    """Write the model's values into a shard of the master weights where they differ from it."""
    master = shard.read(MASTER)
    values = values.to(master.device)
    differs = master.to(values.dtype) != values
    shard.write(MASTER, shard.start, torch.where(differs, values.to(master.dtype), master))
