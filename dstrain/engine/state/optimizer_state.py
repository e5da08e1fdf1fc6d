"""Creation of optimizer state before the first step, and the scalars in it and in groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dstrain.core.errors import CheckpointError, Problem
from dstrain.core.log import get_logger
from dstrain.engine.state.shards import StateShard

logger = get_logger(__name__)

_PROBE_NUMEL = 4
# Hyper-parameters that training does not change, and that are never restored from a checkpoint.
STATIC = frozenset(
    [
        "params",
        "weight_decay",
        "eps",
        "dampening",
        "nesterov",
        "amsgrad",
        "bias_correction",
        "maximize",
        "foreach",
        "capturable",
        "differentiable",
        "fused",
        "decoupled_weight_decay",
    ]
)
_NUMBERS = (bool, int, float)


def read_scalars(shards: Iterable[StateShard]) -> dict[str, dict[str, Any]]:
    """Return the single numbers in the state of each parameter, such as a step count, by name.

    Args:
        shards: all shards of this rank, since some optimizers keep one number for a whole group.
    """
    found: dict[str, dict[str, Any]] = {}
    shards = list(shards)
    latest = _latest_steps(shards)
    for shard in shards:
        numbers = {}
        for key, value in shard.state.items():
            if isinstance(value, torch.Tensor):
                if shard.is_number(key):
                    numbers[key] = value.item()
            elif isinstance(value, _NUMBERS):
                numbers[key] = value
        step = latest.get((id(shard.optimizer), shard.group))
        if step is not None and "step" in numbers:
            numbers["step"] = step
        if numbers:
            found[shard.name] = numbers
    return found


def _latest_steps(shards: list[StateShard]) -> dict[tuple[int, int], Any]:
    """Return the step count of each parameter group of DeepSpeed's FusedAdam.

    FusedAdam uses the count of a group's last parameter for the whole group, and increases only
    that one (``ops/adam/fused_adam.py:step``).

    Returns:
        (``id`` of the optimizer, index of the group) -> step count.
    """
    steps: dict[tuple[int, int], Any] = {}
    for shard in shards:
        if type(shard.optimizer).__name__ == "FusedAdam" and "step" in shard.state:
            key = (id(shard.optimizer), shard.group)
            steps[key] = max(steps.get(key, 0), shard.state["step"])
    return steps


def create_state(shards: Iterable[StateShard], saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Create the state of parameters that had state in the saved run, and set its numbers.

    Tensors of state that exists already keep their values. If several parameters share a tensor
    (``StateShard.holder``), its state gets the largest of their numbers, which differ only if one
    of them was never stepped.

    Args:
        shards: all shards of this rank.
        saved: the saved numbers by parameter name, as ``read_scalars`` returned them; an empty
            mapping for a parameter whose state has none.

    Raises:
        CheckpointError: the optimizer cannot have such state.
    """
    wanted: dict[int, tuple[StateShard, dict[str, Any]]] = {}
    for shard in shards:
        if shard.name not in saved or shard.optimizer is None:
            continue
        _, numbers = wanted.setdefault(id(shard.holder), (shard, {}))
        for key, value in saved[shard.name].items():
            numbers[key] = max(numbers.get(key, value), value)
    for shard, numbers in wanted.values():
        state = shard.optimizer.state[shard.holder]
        if not state:
            _make_state(shard, state)
        for key, value in numbers.items():
            present = state.get(key)
            try:
                if isinstance(present, torch.Tensor):
                    present.fill_(value)
                elif key in state:
                    state[key] = type(present)(value) if isinstance(present, _NUMBERS) else value
            except (ValueError, OverflowError, RuntimeError) as error:
                raise CheckpointError(
                    Problem(
                        f"the checkpoint has {key}={value} in the optimizer's state of "
                        f"{shard.name}",
                        f"{type(shard.optimizer).__name__} cannot have that: {error}",
                        "use another checkpoint",
                    )
                ) from error


def _make_state(shard: StateShard, state: dict[str, Any]) -> None:
    """Fill the empty state of a shard's holder, in the form that the optimizer gives to a probe.

    Tensors of the holder's shape are zeros, on the disk if the holder is offloaded there.

    Raises:
        CheckpointError: the optimizer cannot step the probe.
    """
    holder = shard.holder
    on_disk: dict[str, torch.dtype] = {}
    for key, value in _probe_state(shard).items():
        if not isinstance(value, torch.Tensor):
            state[key] = value
        elif value.shape != (_PROBE_NUMEL,):
            state[key] = value.clone()
        elif shard.swapped is not None:
            on_disk[key] = value.dtype
        else:
            state[key] = torch.zeros_like(holder, dtype=value.dtype, device=value.device)
    if shard.swapped is not None:
        shard.swapped.add_state(state, on_disk)


def _probe_state(shard: StateShard) -> dict[str, Any]:
    """Return the state that the optimizer of a shard gives to a small 1-D tensor.

    Lets the optimizer step that tensor with a gradient of zeros.

    Raises:
        CheckpointError: the optimizer cannot step such a tensor.
    """
    optimizer, holder = shard.optimizer, shard.holder
    probe = torch.zeros(_PROBE_NUMEL, dtype=holder.dtype, device=holder.device, requires_grad=True)
    probe.grad = torch.zeros_like(probe)
    groups = optimizer.param_groups
    optimizer.param_groups = [{**groups[shard.group], "params": [probe]}]
    try:
        optimizer.step()
    except Exception as error:
        raise CheckpointError(
            Problem(
                f"the state of {type(optimizer).__name__} cannot be created before its first step",
                f"{type(error).__name__}: {error}",
                "resume with the weights alone, or use another optimizer",
            )
        ) from error
    finally:
        optimizer.param_groups = groups
        made: dict[str, Any] = optimizer.state.pop(probe, {})
    return made


def group_values(optimizer: Any) -> list[dict[str, Any]]:
    """Return the values of each parameter group that may change in training, such as rates."""
    return [changing_values(group) for group in optimizer.param_groups]


def changing_values(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a parameter group that may change in training, without tensors."""
    return {
        key: _plain(value) for key, value in group.items() if key not in STATIC and _fits(value)
    }


def same_for_all(saved: list[dict[str, Any]]) -> bool:
    """Tell whether all saved groups have equal values, so that they fit any number of groups."""
    return all(values == saved[0] for values in saved[1:])


def set_group_values(
    optimizer: Any,
    saved: list[dict[str, Any]],
    *,
    instead: list[dict[str, Any]] | None = None,
) -> None:
    """Restore what ``group_values`` returned; equal saved groups fit any number of groups.

    Args:
        optimizer: the basic optimizer, which has the groups.
        saved: values of the saved groups.
        instead: for each group of the optimizer, values that take precedence over saved ones.

    Raises:
        CheckpointError: the number of groups differs and the saved groups are not equal, or a value
            has another type than in this run.
    """
    groups = optimizer.param_groups
    if len(groups) != len(saved) and saved and same_for_all(saved):
        logger.warning(
            "the checkpoint's %d parameter groups were alike: each of the %d groups of this run "
            "goes on with their rate and momenta",
            len(saved),
            len(groups),
        )
        saved = [saved[0]] * len(groups)
    check_number_of_groups(len(groups), saved)
    preferred = instead or [{}] * len(groups)
    for group, values, first in zip(groups, saved, preferred, strict=True):
        for key, value in {**values, **first}.items():
            present = group.get(key)
            if key in group and not _alike(_plain(present), value):
                raise CheckpointError(
                    Problem(
                        f"the checkpoint has {key}={value!r} for a parameter group of "
                        f"{type(optimizer).__name__}",
                        f"this run has {_plain(present)!r} there, a value of another kind",
                        "use the optimizer of the run that wrote it",
                    )
                )
            if isinstance(present, torch.Tensor):
                present.fill_(value)
            else:
                group[key] = tuple(value) if isinstance(present, tuple) else value


def check_number_of_groups(count: int, saved: list[dict[str, Any]]) -> None:
    """Check that there are as many saved groups as ``count``, or that all saved ones are equal.

    Raises:
        CheckpointError: neither is so.
    """
    if count == len(saved) or (saved and same_for_all(saved)):
        return
    raise CheckpointError(
        Problem(
            f"the checkpoint has {len(saved)} parameter groups, this run {count}",
            "their learning rates and step counts cannot be told apart",
            "use the optimizer and the decay rule of the run that wrote it",
        )
    )


def _plain(value: Any) -> Any:
    """Return the number in a tensor of one element, and any other value as it is."""
    fits = isinstance(value, torch.Tensor) and value.numel() == 1
    return value.item() if fits else value


def _alike(here: Any, there: Any) -> bool:
    """Tell whether a saved value of a parameter group can replace the value of this run.

    Both must be numbers, strings, or sequences of the same length. If this run has None or a value
    of another type, any saved value is accepted.

    Args:
        here: value of this run.
        there: saved value.
    """
    if isinstance(here, _NUMBERS):
        return isinstance(there, _NUMBERS)
    if isinstance(here, (tuple, list)):
        return isinstance(there, (tuple, list)) and len(here) == len(there)
    return not isinstance(here, str) or isinstance(there, str)


def _fits(value: Any) -> bool:
    """Tell whether a value of a parameter group can be saved as plain values."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    if isinstance(value, (tuple, list)):
        return all(isinstance(v, _NUMBERS) for v in value)
    return value is None or isinstance(value, (*_NUMBERS, str))
