"""Reading of DeepSpeed's own checkpoints, stages 0 to 3, as ``engine.save_checkpoint`` writes them.

Follows the files of DeepSpeed 0.19: ``mp_rank_00_model_states.pt`` has the module and the counters,
``zero_pp_rank_K_mp_rank_00_optim_states.pt`` the partition of rank K. At stage 3 each rank has a
file of both kinds, and the files of the first kind lack the module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dstrain.checkpoint.foreign.parts import (
    ForeignRun,
    Partition,
    engine_record,
    match_groups,
    moments_of,
)
from dstrain.checkpoint.foreign.pickles import load_pickle
from dstrain.core.errors import CheckpointError, Problem
from dstrain.models import Stored

_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt$")
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def tag_folder(folder: Path) -> Path | None:
    """Return the folder with DeepSpeed's files: ``folder`` or the folder named in ``latest``.

    Returns None where there are no such files.

    Raises:
        CheckpointError: ``latest`` names a folder that does not exist.
    """
    if any(_MODEL_FILE.match(path.name) for path in folder.glob("*_model_states.pt")):
        return folder
    latest = folder / "latest"
    if not latest.is_file():
        return None
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if tag in ("", "..") or Path(tag).name != tag or not (folder / tag).is_dir():
        raise CheckpointError(
            Problem(
                f"{latest} names {tag!r}, which is no folder beside it",
                "the save may not have been finished",
                "name the folder of another tag",
            )
        )
    return folder / tag


def read_deepspeed(folder: Path, decayed: list[str] | None = None) -> ForeignRun:
    """Read the structure of a checkpoint; tensors stay in their files.

    Args:
        folder: folder with the files of a tag.
        decayed: names of parameters with weight decay; used at stage 0, whose files do not name the
            optimizer's parameters.

    Raises:
        CheckpointError: files are missing, the checkpoint is of a kind that cannot be split by
            parameter, or a file can only be read by executing it.
    """
    models = _numbered(folder, _MODEL_FILE)
    optimizers = _numbered(folder, _OPTIMIZER_FILE)
    _refuse_unknown(folder, models, optimizers)
    model = load_pickle(models[min(models)])
    world_size = int(model["dp_world_size"])
    if not optimizers:
        return _stage_zero(model, decayed)
    missing = sorted(set(range(world_size)) - set(optimizers))
    if missing:
        raise CheckpointError(
            Problem(
                f"{folder} lacks the optimizer state of ranks {missing}",
                f"{world_size} ranks wrote it",
                "copy the files of all machines into one folder",
            )
        )
    states = [load_pickle(optimizers[rank]) for rank in range(world_size)]
    inner = [state["optimizer_state_dict"] for state in states]
    stage = int(inner[0].get("zero_stage", 1))  # BF16_Optimizer, of stage 1, leaves the entry out
    shapes = {
        name: tuple(shape) for group in model["param_shapes"] or [] for name, shape in group.items()
    }
    if stage == 3:
        partitions = [_stage_three(model, state, rank) for rank, state in enumerate(inner)]
        for rank, partition in enumerate(partitions):
            whole = model if rank == 0 else load_pickle(models[rank])
            _add_frozen_parts(partition, whole, rank, world_size)
        frozen = _shapes(model["frozen_param_shapes"] or {})
        base = inner[0]["optimizer_state_dict"]
    else:
        partitions = _stages_one_and_two(inner, shapes)
        weights = _frozen_weights(model, shapes)
        for name, values in weights.items():
            partitions[0].add_frozen(name, 0, values)
        frozen = {name: tuple(values.shape) for name, values in weights.items()}
        base = inner[0]["base_optimizer_state"]
    config = states[0].get("ds_config") or model.get("ds_config")
    return _foreign(
        model,
        stage=stage,
        config=config,
        parameters=_in_order(model, shapes | frozen),
        optimized=tuple(shapes),
        partitions=partitions,
        groups=base["param_groups"],
        scale=inner[0].get("loss_scaler"),
    )


def _stages_one_and_two(
    states: list[dict[str, Any]], shapes: Mapping[str, tuple[int, ...]]
) -> list[Partition]:
    """Read the partitions of stages 1 and 2: each rank has a contiguous part of each flat group."""
    reached = dict.fromkeys(shapes, 0)
    partitions = []
    for state in states:
        if any(any(p) for p in state.get("param_alignment_paddings") or []):
            raise _unknown("zero_optimization.parameter_alignment")
        if not isinstance(state["base_optimizer_state"], Mapping):
            raise _unknown("zero_optimization.elastic_checkpoint")
        base, partition = state["base_optimizer_state"], Partition()
        for index, mapping in enumerate(state["param_slice_mappings"]):
            flat = state["single_partition_of_fp32_groups"][index].view(-1)
            group = base["param_groups"][index]
            values = base["state"].get(group["params"][0], {})
            for name, address in mapping.items():
                partition.add(
                    name,
                    reached[name],
                    flat.narrow(0, address.start, address.numel),
                    values,
                    group=group,
                    offset=address.start,
                )
                reached[name] += address.numel
        partitions.append(partition)
    return partitions


def _stage_three(model: Mapping[str, Any], state: Mapping[str, Any], rank: int) -> Partition:
    """Read a rank's share of every parameter at stage 3: equal shares, the last one padded."""
    base, partition = state["optimizer_state_dict"], Partition()
    world_size = int(model["dp_world_size"])
    numbers = [(p, group) for group in base["param_groups"] for p in group["params"]]
    for index, shapes in enumerate(model["param_shapes"]):
        flat = state["fp32_flat_groups"][index].view(-1)
        number, group = numbers[index]
        offset = 0
        for name, shape in shapes.items():
            total = math.prod(shape)
            size = math.ceil(total / world_size)
            start = min(rank * size, total)
            numel = min(size, total - start)
            if numel:
                partition.add(
                    name,
                    start,
                    flat.narrow(0, offset, numel),
                    base["state"].get(number, {}),
                    group=group,
                    offset=offset,
                )
            offset += size
    return partition


def _add_frozen_parts(
    partition: Partition, model: Mapping[str, Any], rank: int, world_size: int
) -> None:
    shapes = model["frozen_param_shapes"] or {}
    for name, fragment in (model["frozen_param_fragments"] or {}).items():
        total = math.prod(shapes[name])
        start = min(rank * math.ceil(total / world_size), total)
        numel = min(fragment.numel(), total - start)
        if numel:
            partition.add_frozen(name, start, fragment.reshape(-1).narrow(0, 0, numel))


def _stage_zero(model: Mapping[str, Any], decayed: list[str] | None) -> ForeignRun:
    """Read the single file of stage 0, whose optimizer only numbers its parameters."""
    saved = model["optimizer"]
    if not saved:
        raise CheckpointError(
            Problem("the checkpoint has no optimizer state", "", "start from its weights")
        )
    base = saved.get("optimizer_state_dict", saved)  # nested in the state of a 16-bit wrapper
    weights = _frozen_weights(model, {})
    shapes = {name: tuple(values.shape) for name, values in weights.items()}
    if "fp32_groups_flat" in saved:
        named = _match_flat(saved["fp32_groups_flat"], shapes, decayed)
    else:
        named = match_groups(base["param_groups"], shapes, decayed)
    flat = "fp32_groups_flat" in saved
    moments: frozenset[str] = frozenset()
    if not flat:
        states = [base["state"].get(n, {}) for g in base["param_groups"] for n in g["params"]]
        members = [shapes[name] for names in named for name in names]
        moments = moments_of(zip(members, states, strict=True))
    partition = Partition()
    for index, names in enumerate(named):
        group = base["param_groups"][index]
        offset = 0
        for place, name in enumerate(names):
            numel = math.prod(shapes[name])
            if flat:
                values = saved["fp32_groups_flat"][index].view(-1).narrow(0, offset, numel)
                state, at = base["state"].get(group["params"][0], {}), offset
            else:
                masters = saved.get("fp32_groups")
                values = weights[name] if masters is None else masters[index][place]
                state, at = base["state"].get(group["params"][place], {}), 0
            _check_same(name, values, weights[name])
            own = () if shapes[name] else moments
            values = values.reshape(-1)
            partition.add(name, 0, values, state, group=group, offset=at, moments=own)
            offset += numel
    scale = {name: saved[name] for name in _SCALE if name in saved}
    return _foreign(
        model,
        stage=0,
        config=model.get("ds_config"),
        parameters=shapes,
        optimized=tuple(n for names in named for n in names),
        partitions=[partition],
        groups=base["param_groups"],
        scale=scale or None,
        remarks=("the optimizer's parameters have no names in it: matched by order and shape",),
    )


def _match_flat(
    flats: list[torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    decayed: list[str] | None,
) -> list[list[str]]:
    """Return the names of the parameters in each flat group, inferred from the groups' sizes."""
    rules = [[n for n, shape in shapes.items() if len(shape) > 1]]
    rules.insert(0, list(shapes))
    if decayed is not None:
        rules.insert(0, [n for n in shapes if n in set(decayed)])
    sizes = [flat.numel() for flat in flats]
    for rule in rules:
        parts = [rule, [n for n in shapes if n not in set(rule)]]
        parts = [part for part in parts if part]
        if [sum(math.prod(shapes[n]) for n in part) for part in parts] == sizes:
            return parts
    raise CheckpointError(
        Problem(
            f"the optimizer has flat groups of {sizes} elements",
            "no known way to group the model's parameters gives these sizes",
            "import a checkpoint of ZeRO stage 1 to 3, which has names; or start from the weights",
        )
    )


def _check_same(name: str, master: torch.Tensor, weight: torch.Tensor) -> None:
    """Check that rounded master weights equal the weights; else names were matched wrongly."""
    if master.numel() != weight.numel() or not torch.equal(
        master.detach().reshape(-1).to(weight.dtype), weight.detach().reshape(-1)
    ):
        raise CheckpointError(
            Problem(
                f"the optimizer's copy of {name} has other values than the model",
                "its parameters are in an order that is not known",
                "import a checkpoint of ZeRO stage 1 to 3, which has names; or start from the "
                "weights",
            )
        )


def _foreign(
    model: Mapping[str, Any],
    *,
    stage: int,
    config: Any,
    parameters: dict[str, tuple[int, ...]],
    optimized: tuple[str, ...],
    partitions: list[Partition],
    groups: Any,
    scale: Any,
    remarks: tuple[str, ...] = (),
) -> ForeignRun:
    config = config if isinstance(config, Mapping) else {}
    precision = next(
        (p for p in ("bf16", "fp16") if (config.get(p) or {}).get("enabled") is True), "fp32"
    )
    steps, samples = int(model["global_steps"]), int(model.get("global_samples") or 0)
    batch = samples // steps if steps else None
    micro = config.get("train_micro_batch_size_per_gpu")
    ranks = int(model["dp_world_size"])
    accumulation = batch // (micro * ranks) if batch and isinstance(micro, int) and micro else 1
    attributes = scale if isinstance(scale, dict) else getattr(scale, "__dict__", None)
    return ForeignRun(
        kind=f"DeepSpeed {model.get('ds_version', '')}, ZeRO stage {stage}, {ranks} ranks",
        step=steps,
        stage=stage,
        precision=precision,
        parameters=parameters,
        optimized=optimized,
        partitions=partitions,
        buffers=[Stored.of(n, model["module"][n]) for n in model["buffer_names"] or []],
        engine=engine_record(
            step=steps,
            samples=samples,
            skipped=int(model["skipped_steps"]),
            accumulation=max(1, accumulation),
            groups=groups,
            schedule=model.get("lr_scheduler"),
            loss_scale=None
            if attributes is None or precision != "fp16"
            else {name: attributes[name] for name in _SCALE if name in attributes},
        ),
        global_batch_size=batch or None,
        config=config or None,
        remarks=remarks,
    )


def _frozen_weights(
    model: Mapping[str, Any], trained: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """Return the module's parameters that are not in ``trained``, tied ones by their first name."""
    leave = {*trained, *(model["buffer_names"] or []), *(model.get("shared_params") or {})}
    seen: set[tuple[int, int]] = set()
    found = {}
    for name, values in model["module"].items():
        place = (values.data_ptr(), values.numel())
        if name not in leave and place not in seen:
            found[name] = values
        seen.add(place)
    return found


def _in_order(
    model: Mapping[str, Any], shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    ordered = [name for name in model["module"] if name in shapes]
    return {name: shapes[name] for name in dict.fromkeys([*ordered, *shapes])}


def _shapes(shapes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in shapes.items()}


def _numbered(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """Map data-parallel ranks to their files of one kind.

    Raises:
        CheckpointError: there are model-parallel ranks.
    """
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = pattern.match(path.name)
        if match:
            if int(match[2]):
                raise _unknown(f"tensor or pipeline parallelism ({path.name})")
            found[int(match[1] or 0)] = path
    return found


def _refuse_unknown(folder: Path, models: dict[int, Path], optimizers: dict[int, Path]) -> None:
    if not models:
        raise CheckpointError(
            Problem(f"{folder} has no *_model_states.pt", "", "name a folder of DeepSpeed's")
        )
    names = [path.name for path in folder.iterdir()]
    if any(name.startswith(("expp_rank_", "layer_")) for name in names):
        raise _unknown("experts or pipeline layers")
    if "offloaded_tensors" in names:
        raise _unknown("optimizer state that was offloaded to NVMe")
    if "zero" in names and not optimizers:
        raise _unknown("DeepSpeed's universal format")


def _unknown(what: str) -> CheckpointError:
    return CheckpointError(
        Problem(
            f"a DeepSpeed checkpoint with {what}",
            "dstrain cannot take it apart by parameters",
            "load it in the program that wrote it and save the weights with save_pretrained",
        )
    )
