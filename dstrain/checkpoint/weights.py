"""Loading of a checkpoint's weights alone into an engine that has trained, for the best model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dstrain.checkpoint import content
from dstrain.checkpoint.buffer_files import load_buffers, reshaped_in
from dstrain.checkpoint.extra_state import KEY, put_extra_states, states_for
from dstrain.checkpoint.files import reading
from dstrain.checkpoint.load import check_local_slices, misfits, read_shards
from dstrain.checkpoint.loading_code import call_loading_code
from dstrain.checkpoint.manifest import Manifest
from dstrain.checkpoint.run_files import read_rank_state, read_run
from dstrain.checkpoint.slice_index import read_index
from dstrain.core.documents import FileName, Text, read_document, unreadable
from dstrain.core.errors import CheckpointError, Problem, raise_problems
from dstrain.core.ranks import Ranks
from dstrain.engine import Engine, Slot, StateShard, empty_slots_of, slots_of
from dstrain.models import Group, groups_of

_INDEX = "model.safetensors.index.json"


def load_weights(engine: Engine, folder: Path, manifest: Manifest, ranks: Ranks) -> None:
    """Load a checkpoint's weights and buffers into an engine; a collective of all ranks.

    Optimizer state, schedule, loss scale and counters stay as they are. Master weights come from
    the checkpoint's slices; without slices, from its Hugging Face files. Each rank reads only its
    shards' elements, a piece at a time.

    Raises:
        CheckpointError: the checkpoint does not fit the model.
    """
    with engine.state.loading() as held:
        index = read_index(folder, manifest) if manifest.has_slices else None
        run = read_run(folder) if manifest.has(content.RUN) else {}
        rank_state = read_rank_state(folder, manifest, ranks)
        reshaped = reshaped_in(run, engine)
        problems = misfits(engine, folder, manifest, index, ranks, reshaped=reshaped)
        raise_problems(problems, error=CheckpointError, title="the checkpoint misfits")
        if index is not None and manifest.elsewhere:
            check_local_slices(held, index, folder, values_only=True)

        def read(shards: list[StateShard]) -> None:
            if index is None:
                _from_model_files(engine, shards, folder, manifest)
            else:
                read_shards(shards, index, values_only=True)

        read(held)
        load_buffers(engine, folder, manifest, ranks, reshaped=reshaped)
        put_extra_states(engine.module, states_for(run, rank_state))
    if call_loading_code(engine, ranks):
        with engine.state.loading() as held:
            read(held)


def _from_model_files(
    engine: Engine, held: list[StateShard], folder: Path, manifest: Manifest
) -> None:
    places = _places(folder, manifest)
    groups = groups_of(engine.module)
    emptied = [g for g in groups if _is_buffer(g) and g.saved[0].name not in places]
    groups = [group for group in groups if group not in emptied]
    absent = sorted(s.name for group in groups for s in group.saved if s.name not in places)
    if absent:
        raise CheckpointError(
            Problem(
                f"{folder} has no {absent[0]}",
                f"{len(absent)} tensors of the model are in none of its model files",
                "choose another checkpoint",
            )
        )
    parameters = dict(engine.module.named_parameters())
    of_parameter: dict[int, list[StateShard]] = {}
    for shard in held:
        of_parameter.setdefault(id(parameters[shard.name]), []).append(shard)
    slots = {id(slot.tensor): slot for slot in slots_of(engine.module)}
    known = of_parameter.keys() | slots.keys() | set(map(id, parameters.values()))
    groups = [g for g in groups if all(id(entry.tensor) in known for entry in g.entries)]
    with torch.no_grad():
        for group in emptied:  # a buffer that is not in the files was None when they were saved
            slots[id(group.entries[0].tensor)].replace(None)
        for group in groups:
            _read_group(group, places, of_parameter, slots)
        _read_late(engine, {n: places[n] for n in places.keys() - _saved_names(groups)})


def _is_buffer(group: Group) -> bool:
    """Tell whether a group is a single buffer, saved without a conversion."""
    return group.is_as_trained and not isinstance(group.entries[0].tensor, torch.nn.Parameter)


def _saved_names(groups: Iterable[Group]) -> set[str]:
    return {saved.name for group in groups for saved in group.saved}


def _read_late(engine: Engine, places: Mapping[str, Path]) -> None:
    """Read tensors that a new model lacks: buffers created later, and extra state in tensors."""
    empty = {slot.name: slot for slot in empty_slots_of(engine.module)}
    for name, path in sorted(places.items()):
        with reading(path) as file:
            values = file.whole(name)
        owner, _, key = name.rpartition(".")
        if key == KEY:
            put_extra_states(engine.module, {owner: values})
        elif name in empty:
            empty[name].replace(values)


def _read_group(
    group: Group,
    places: dict[str, Path],
    of_parameter: dict[int, list[StateShard]],
    slots: dict[int, Slot],
) -> None:
    """Read a group of tensors into this rank's shards and buffers.

    Reads only the shards' elements of an unconverted tensor, and all tensors of a converted group.
    """
    wanted = [of_parameter.get(id(entry.tensor), []) for entry in group.entries]
    buffers = [e for e in group.entries if not isinstance(e.tensor, torch.nn.Parameter)]
    if not any(wanted) and not buffers:
        return
    if group.is_as_trained and not buffers:
        name = group.saved[0].name
        with reading(places[name]) as file:
            for shard in wanted[0]:
                values = file.read(name, shard.start, shard.stop)
                shard.write(shard.value_key, shard.start, values)
        return
    if group.is_as_trained:
        name = group.saved[0].name
        with reading(places[name]) as file:
            slots[id(buffers[0].tensor)].replace(file.whole(name))
        return
    tensors = {}
    for saved in group.saved:
        with reading(places[saved.name]) as file:
            values = file.read(saved.name, 0, file.numel(saved.name))
        tensors[saved.name] = values.view(saved.shape)
    for entry, shards_of_it, whole in zip(
        group.entries, wanted, group.restore(tensors), strict=True
    ):
        if entry in buffers:
            slots[id(entry.tensor)].put(whole)
        for shard in shards_of_it:
            values = whole.reshape(-1)[shard.start : shard.stop]
            shard.write(shard.value_key, shard.start, values)


@dataclass(frozen=True)
class _ShardIndex:
    """Content of ``model.safetensors.index.json``: tensor name -> file name."""

    weight_map: Mapping[Text, FileName]


def _places(folder: Path, manifest: Manifest) -> dict[str, Path]:
    """Map the names of the model's tensors to the Hugging Face files that contain them.

    Raises:
        CheckpointError: the index is damaged, or names a file that is no part of the checkpoint.
    """
    if manifest.has(_INDEX):
        files = read_document(folder / _INDEX, _ShardIndex).weight_map
        if unknown := sorted(f for f in files.values() if not manifest.has(f)):
            raise unreadable(folder / _INDEX, ValueError(f"{unknown[0]} is no part of it"))
        return {name: folder / file for name, file in files.items()}
    path = folder / "model.safetensors"
    with reading(path) as file:
        return dict.fromkeys(file.keys(), path)
