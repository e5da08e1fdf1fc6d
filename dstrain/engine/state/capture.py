"""The state of an engine, held in host memory while another engine takes its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dstrain.engine.state.optimizer_state import create_state, read_scalars
from dstrain.engine.state.progress import begin_load, finish_load, read_progress, write_progress
from dstrain.engine.state.shards import WEIGHT, regions

if TYPE_CHECKING:
    from dstrain.engine.engine import Engine


@dataclass(frozen=True)
class Carried:
    """This rank's part of an engine's state, and what all ranks know.

    Attributes:
        tensors: (parameter, start, key) -> values.
        scalars: single numbers of the optimizer's state by parameter.
        progress: counters, loss scale, rates, schedule.
    """

    tensors: dict[tuple[str, int, str], torch.Tensor]
    scalars: dict[str, dict[str, Any]]
    progress: dict[str, Any]


def carry(engine: Engine) -> Carried:
    """Copy the state; no other rank is asked."""
    held = regions(engine)
    tensors = {
        (region.name, region.start, key): region.read(key).to("cpu", copy=True)
        for region in held
        for key in region.tensor_keys()
        if key != WEIGHT
    }
    return Carried(tensors, read_scalars(held), read_progress(engine))


def put_down(engine: Engine, carried: Carried) -> None:
    """Restore the state in a fresh engine of the same topology; a collective of all ranks."""
    begin_load(engine)
    held = regions(engine)
    create_state(held, carried.scalars)
    for region in held:
        for key in region.tensor_keys():
            values = carried.tensors.get((region.name, region.start, key))
            if values is not None:
                region.write(key, region.start, values)
    finish_load(engine)
    write_progress(engine, carried.progress)
