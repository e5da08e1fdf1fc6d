"""Reading a checkpoint's weights alone into an engine that has trained: the best model of a run."""

from __future__ import annotations

import json
from pathlib import Path

from dstrain.checkpoint.load import (
    check_here,
    load_buffers,
    misfits,
    read_index,
    read_regions,
    reading,
)
from dstrain.checkpoint.manifest import Manifest
from dstrain.core.errors import CheckpointError, Problem, raise_problems
from dstrain.core.ranks import Ranks, all_or_none
from dstrain.engine import Engine, Region, begin_load, finish_load, regions, slots_of

_INDEX = "model.safetensors.index.json"


def load_weights(engine: Engine, folder: Path, manifest: Manifest, ranks: Ranks) -> None:
    """Put a checkpoint's weights and buffers into an engine; a collective of all ranks.

    Optimizer state, schedule, loss scale and counters stay as they are. Master weights come from
    the checkpoint's slices; where it has none, from its Hugging Face files. Each rank reads what
    its regions need, a piece at a time.

    Raises:
        CheckpointError: it does not fit the model.
    """
    begin_load(engine)
    with all_or_none():
        held = regions(engine)
        index = read_index(folder, manifest) if manifest.has_slices else None
        problems = misfits(engine, folder, manifest, index, ranks)
        raise_problems(problems, error=CheckpointError, title="the checkpoint misfits")
        if index is None:
            _from_model_files(engine, held, folder)
        else:
            if manifest.elsewhere:
                check_here(held, index, folder, values_only=True)
            read_regions(held, index, values_only=True)
        load_buffers(engine, folder, manifest, ranks)
    finish_load(engine)


def _from_model_files(engine: Engine, held: list[Region], folder: Path) -> None:
    places = _places(folder)
    aliases: dict[int, list[str]] = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    stored_as = {
        names[0]: next((n for n in names if n in places), None) for names in aliases.values()
    }
    missing = sorted(name for name, stored in stored_as.items() if stored is None)
    if missing:
        raise CheckpointError(
            Problem(
                f"{folder} has no weights of {missing[0]}",
                f"{len(missing)} parameters are in none of its model files",
                "choose another checkpoint",
            )
        )
    for region in held:
        stored_name = stored_as[region.name]
        assert stored_name is not None
        with reading(places[stored_name]) as file:
            values = file.read(stored_name, region.start, region.stop)
        region.write(region.value_key, region.start, values)
    for slot in slots_of(engine.module):
        if slot.persistent and slot.name in places:
            with reading(places[slot.name]) as file:
                slot.put(file.whole(slot.name))


def _places(folder: Path) -> dict[str, Path]:
    """File of every tensor of a Hugging Face folder."""
    if (folder / _INDEX).is_file():
        content_of_index = json.loads((folder / _INDEX).read_text())
        return {name: folder / file for name, file in content_of_index["weight_map"].items()}
    path = folder / "model.safetensors"
    with reading(path) as file:
        return dict.fromkeys(file.keys(), path)
