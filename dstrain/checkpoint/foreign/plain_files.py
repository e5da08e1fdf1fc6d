"""Reading of checkpoints of transformers' Trainer that were written without DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dstrain.checkpoint.files import mapping
from dstrain.checkpoint.foreign.parts import (
    ForeignRun,
    Partition,
    engine_record,
    match_groups,
    moments_of,
)
from dstrain.checkpoint.foreign.pickles import load_pickle
from dstrain.checkpoint.trainer_state import STATE, TrainerStateRecord
from dstrain.core.documents import Plain, read_document, typed, unreadable
from dstrain.core.errors import CheckpointError, Problem
from dstrain.models import Stored, skeleton_of

OPTIMIZER = "optimizer.pt"
SCHEDULE = "scheduler.pt"


def read_plain(folder: Path, state: Mapping[str, Any]) -> ForeignRun:
    """Read the structure of a checkpoint; tensors stay in their files.

    Args:
        folder: a folder ``checkpoint-N`` with weights, optimizer.pt and scheduler.pt.
        state: content of its ``trainer_state.json``.

    Raises:
        CheckpointError: files are missing or do not fit, or a file can only be read by executing
            it.
        ModelError: the folder's ``config.json`` does not describe the model.
    """
    model = skeleton_of(folder)
    weights = _weights(folder)
    for alias, first in model.tied.items():
        if alias in weights:
            weights.setdefault(first, weights[alias])
    optimizer = load_pickle(folder / OPTIMIZER)
    groups = match_groups(optimizer["param_groups"], model.parameters, model.decayed)
    partition = Partition()
    states = {
        name: optimizer["state"].get(number, {})
        for group, members in zip(optimizer["param_groups"], groups, strict=True)
        for number, name in zip(group["params"], members, strict=True)
    }
    moments = moments_of((model.parameters[name], held) for name, held in states.items())
    for group, members in zip(optimizer["param_groups"], groups, strict=True):
        for name in members:
            shape, held = model.parameters[name], states[name]
            values = _value(weights, name, shape, folder)
            own = () if shape else moments
            partition.add(name, 0, values, held, group=group, offset=0, moments=own)
            _check_shapes(name, shape, held)
    if state.get("global_step") is None:
        raise CheckpointError(Problem(f"{folder / STATE} does not say its global_step"))
    step = int(state["global_step"])
    schedule = load_pickle(folder / SCHEDULE) if (folder / SCHEDULE).exists() else None
    return ForeignRun(
        kind="transformers' Trainer",
        step=step,
        stage=0,
        precision="fp32",
        parameters=model.parameters,
        optimized=tuple(name for members in groups for name in members),
        partitions=[partition],
        buffers=[Stored.of(name, weights[name]) for name in model.buffers if name in weights],
        engine=engine_record(
            step=step,
            samples=0,
            skipped=0,
            accumulation=1,
            groups=optimizer["param_groups"],
            schedule=schedule,
            loss_scale=None,
        ),
        remarks=("the optimizer's parameters have no names in it: matched by order and shape",),
    )


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all weights by name, memory-mapped, so that values are read on use."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with mapping(path) as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not found:
        for path in sorted(folder.glob("pytorch_model*.bin")):
            found |= load_pickle(path)
    if not found:
        raise CheckpointError(
            Problem(f"{folder} has no weights", "no model*.safetensors, no pytorch_model*.bin")
        )
    return found


def _value(
    weights: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...], folder: Path
) -> torch.Tensor:
    if name not in weights:
        close = [other for other in weights if other.split(".")[-2:] == name.split(".")[-2:]][:1]
        raise CheckpointError(
            Problem(
                f"{name} is not among the weights of {folder}",
                f"they have names like {close[0]}" if close else "",
                "transformers stores this architecture in another layout than it trains it in; "
                "start from the weights with model_name_or_path",
            )
        )
    values = weights[name]
    if tuple(values.shape) != shape:
        raise CheckpointError(
            Problem(f"{name} has shape {tuple(values.shape)}", f"config.json says {shape}")
        )
    return values.reshape(-1)


def _check_shapes(name: str, shape: tuple[int, ...], state: Mapping[str, Any]) -> None:
    numel = math.prod(shape)
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.numel() > 1 and tuple(value.shape) != shape:
            what = "other order" if value.numel() == numel else "other shape"
            raise CheckpointError(
                Problem(
                    f"optimizer state {key!r} of {name} has shape {tuple(value.shape)} and not "
                    f"{shape}",
                    f"the optimizer has its parameters in an order that is not known, or state of "
                    f"a shape of its own ({what})",
                    "start from the weights with model_name_or_path",
                )
            )


def read_state(folder: Path) -> dict[str, Any]:
    """Read ``trainer_state.json`` of a folder; return an empty dict where there is none.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = folder / STATE
    if not path.exists():
        return {}
    state: dict[str, Any] = dict(read_document(path, _Object))
    try:
        typed(state, TrainerStateRecord)
    except ValueError as error:
        raise unreadable(path, error) from error
    return state


_Object: Any = Plain
