"""Muon at ZeRO stages 1 to 3: true gradients have their norm and are clipped, then Muon runs.

DeepSpeed orthogonalises gradients before it takes their norm and clips them. The norm is then that
of the update, which does not depend on the gradient, and clipping shortens every update alike. Here
DeepSpeed takes the norm of the gradients and clips these, as at stage 0, and the update follows
in the optimizer step. The momentum is in fp32 and divided like the master weights, so that
checkpoints have its slices.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any

import torch

MOMENTUM = "momentum_buffer"
"""Key of the momentum in the optimizer's state."""


def clip_before_muon(wrapper: Any, optimizer: Any) -> None:
    """Let a Muon of DeepSpeed run after clipping, and create its momentum.

    With the momentum there before the first step, a checkpoint can be loaded into it.

    Args:
        wrapper: DeepSpeed's wrapper of the optimizer, or the optimizer itself.
        optimizer: the basic optimizer; nothing changes unless it is Muon.
    """
    if type(optimizer).__name__ != "MuonWithAuxAdam":
        return
    if hasattr(wrapper, "sub_groups_using_muon"):
        flats = _StageThree(wrapper).flats()
    elif hasattr(wrapper, "single_partition_of_fp32_groups"):
        flats = _StagesOneAndTwo(wrapper).flats()
    else:
        groups = [group for group in optimizer.param_groups if group["use_muon"]]
        flats = [p for group in groups for p in group["params"]]
    for flat in flats:
        optimizer.state[flat][MOMENTUM] = torch.zeros_like(flat, requires_grad=False)


class _AfterClipping(abc.ABC):
    """Runs Muon in the optimizer step of a group, whose gradient is unscaled and clipped by then.

    The momentum and its blend with the gradient are computed element by element in the rank's
    partition. Only Newton-Schulz needs whole matrices.
    """

    def __init__(self, wrapper: Any) -> None:
        """Run before each of the wrapper's optimizer steps."""
        self._wrapper = wrapper
        self._step = wrapper._optimizer_step
        wrapper._optimizer_step = self._update_and_step

    def _update_and_step(self, index: int) -> None:
        """Replace the gradient of a group, or sub-group of stage 3, by the update; then step."""
        settings = self._settings(index)
        if settings["use_muon"]:
            flat = self._all_flats()[index]
            grad, beta = flat.grad, settings["momentum"]
            assert grad is not None
            momentum = self._wrapper.optimizer.state[flat][MOMENTUM]
            momentum.lerp_(grad, 1 - beta)
            grad.lerp_(momentum, beta)
            self._orthogonalize(index, grad, settings)
        self._step(index)

    def flats(self) -> list[torch.Tensor]:
        """Return this rank's flat master weights of the groups or sub-groups that Muon steps."""
        flats = enumerate(self._all_flats())
        return [flat for index, flat in flats if self._settings(index)["use_muon"]]

    @abc.abstractmethod
    def _all_flats(self) -> list[torch.Tensor]:
        """Return this rank's flat master weights of each group or sub-group."""

    @abc.abstractmethod
    def _settings(self, index: int) -> dict[str, Any]:
        """Return the parameter group of a group or sub-group."""

    @abc.abstractmethod
    def _orthogonalize(self, index: int, grad: torch.Tensor, settings: dict[str, Any]) -> None:
        """Orthogonalise the matrices of which ``grad`` has this rank's part; a collective."""


class _StagesOneAndTwo(_AfterClipping):
    """Muon at stages 1 and 2, where most matrices are whole in one rank's partition."""

    def __init__(self, wrapper: Any) -> None:
        """Keep Muon out of the gradients that DeepSpeed puts into partitions."""
        super().__init__(wrapper)
        self._get_flat_partition = wrapper.get_flat_partition
        wrapper.get_flat_partition = self._true_gradients
        wrapper._apply_muon_updates_cpu_offload = _do_nothing

    def _settings(self, index: int) -> dict[str, Any]:
        settings: dict[str, Any] = self._wrapper.optimizer.param_groups[index]
        return settings

    def _all_flats(self) -> list[torch.Tensor]:
        flats: list[torch.Tensor] = self._wrapper.single_partition_of_fp32_groups
        return flats

    def _true_gradients(self, parameters: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """Return the gradients of a partition, without DeepSpeed's update of Muon's parameters."""
        marked = [p for p in parameters if getattr(p, "use_muon", False)]
        for parameter in marked:
            parameter.use_muon = False
        try:
            return self._get_flat_partition(parameters, *args, **kwargs)
        finally:
            for parameter in marked:
                parameter.use_muon = True

    def _orthogonalize(self, index: int, grad: torch.Tensor, settings: dict[str, Any]) -> None:
        """Orthogonalise matrices on the ranks that have a part of them.

        The few matrices across the border of two partitions are gathered. The time grows with the
        number of the group's matrices.
        """
        import torch.distributed as dist

        wrapper, device = self._wrapper, _device()
        group = wrapper.real_dp_process_group[index]
        rank = dist.get_rank(group=group)
        ranks_of = wrapper.param_to_partition_ids[index]
        divided = []
        for parameter in wrapper.round_robin_bit16_groups[index]:
            ranks = ranks_of.get(wrapper.get_param_id(parameter), ())
            if len(ranks) > 1:
                divided.append(parameter)
            elif rank in ranks:
                place, _, numel = self._place(index, rank, parameter)
                part = grad.narrow(0, place, numel).view(parameter.shape)
                part.copy_(_orthogonal(part.to(device), parameter, settings))
        for batch in wrapper._muon_param_batches(divided, grad.element_size()):
            blends = wrapper._muon_all_gather_partitions(batch, index, [grad], group, device)
            for parameter, blend in zip(batch, blends, strict=True):
                if rank in ranks_of[wrapper.get_param_id(parameter)]:
                    update = _orthogonal(blend, parameter, settings).reshape(-1)
                    place, start, numel = self._place(index, rank, parameter)
                    grad.narrow(0, place, numel).copy_(update.narrow(0, start, numel))

    def _place(self, index: int, rank: int, parameter: Any) -> tuple[int, int, int]:
        """Return where a rank's part of a parameter is in its partition and in the parameter.

        Returns:
            index of its first element in the partition, and in the parameter, and their number.
        """
        wrapper, number = self._wrapper, self._wrapper.get_param_id(parameter)
        place = int(wrapper.grad_partition_insertion_offset[index][rank][number])
        start = int(wrapper.grad_start_offset[index][rank][number])
        room = int(wrapper.partition_size[index]) - place
        return place, start, min(parameter.numel() - start, room)


class _StageThree(_AfterClipping):
    """Muon at stage 3, where every matrix is divided among all ranks."""

    def __init__(self, wrapper: Any) -> None:
        """Keep DeepSpeed's step from running Muon before the norm."""
        super().__init__(wrapper)
        wrapper._apply_muon_to_accumulated_grads = _do_nothing

    def _settings(self, index: int) -> dict[str, Any]:
        group = self._wrapper.sub_group_to_group_id[index]
        settings: dict[str, Any] = self._wrapper.optimizer.param_groups[group]
        return settings

    def _all_flats(self) -> list[torch.Tensor]:
        flats: list[torch.Tensor] = self._wrapper.fp32_partitioned_groups_flat
        return flats

    def _orthogonalize(self, index: int, grad: torch.Tensor, settings: dict[str, Any]) -> None:
        """Orthogonalise matrices on the ranks in turn, as many at a time as fit a bucket.

        All ranks gather a matrix, one computes its update and sends each rank its part. The time
        grows with the number of the sub-group's matrices.
        """
        import torch.distributed as dist

        wrapper, device = self._wrapper, _device()
        parameters = wrapper.fp16_groups[index]
        parts = grad.split([p.partition_numel() for p in parameters])
        group = wrapper._get_sub_group_process_group(index)
        rank, count = dist.get_rank(group=group), dist.get_world_size(group=group)
        for low, high in _batches([p.ds_numel for p in parameters], wrapper.reduce_bucket_size):
            batch, own = parameters[low:high], [part.to(device) for part in parts[low:high]]
            blends = wrapper._partitioned_buffers_all_gather(batch, own, grad.dtype)
            updates = [
                _divided(_orthogonal(blend, parameter, settings), count, part.numel())
                if number % count == rank
                else None
                for number, (parameter, blend, part) in enumerate(
                    zip(batch, blends, own, strict=True)
                )
            ]
            for number, (update, part) in enumerate(zip(updates, own, strict=True)):
                if count == 1:
                    assert update is not None
                    part.copy_(update[0])
                else:
                    sender = dist.get_global_rank(group, number % count)
                    part = torch.empty_like(part)
                    dist.scatter(part, update, src=sender, group=group)
                parts[low + number].copy_(part)


def _batches(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of items of at most ``limit`` elements together, or of one item."""
    low, total = 0, 0
    for index, size in enumerate(sizes):
        if index > low and total + size > limit:
            yield low, index
            low, total = index, 0
        total += size
    if sizes:
        yield low, len(sizes)


def _divided(update: torch.Tensor, count: int, numel: int) -> list[torch.Tensor]:
    """Divide an update into the parts of all ranks, of which the last ones are padded."""
    whole = torch.zeros(count * numel, dtype=update.dtype, device=update.device)
    whole[: update.numel()] = update.reshape(-1)
    return list(whole.split(numel))


def _orthogonal(blend: torch.Tensor, parameter: Any, settings: dict[str, Any]) -> torch.Tensor:
    """Return DeepSpeed's update of a whole parameter from the blend of gradient and momentum.

    A momentum with a decay of 0 is the blend itself.
    """
    from deepspeed.runtime.zero.muon.original_muon import muon_update

    update: torch.Tensor = muon_update(
        blend,
        torch.zeros_like(blend),
        beta=0.0,
        nesterov=False,
        ns_method=settings.get("ns_method", "gram"),
        is_expert_group=getattr(parameter, "is_expert_group", False),
        num_heads=getattr(parameter, "muon_num_heads", None),
    )
    return update


def _device() -> Any:
    """Return the device on which this rank computes."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().current_device_name()


def _do_nothing() -> None:
    """Do nothing; stands for DeepSpeed's update before the norm."""
