"""Saving a model as a Hugging Face folder, written by all ranks, at every ZeRO stage.

The ranks that see the folder take turns at writing shards. Partitioned parameters are gathered a
few at a time and kept only by the rank that writes them, so the most a rank holds is one shard
being filled and one being written.
"""

from __future__ import annotations

import copy
import json
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dstrain.core.adapters import has_adapters
from dstrain.core.errors import ModelError, Problem
from dstrain.core.files import unwritten
from dstrain.core.ranks import Ranks, all_or_none, gather_objects
from dstrain.engine import gathered
from dstrain.models.adapters import save_adapters
from dstrain.models.layout import Entry, groups_of
from dstrain.models.shards import (
    SHARD_BYTES,
    Portion,
    gather_batches,
    index_of,
    parameters_of,
    plan_shards,
    shard_names,
)
from dstrain.models.tensor_file import Stored, write_tensor_file

INDEX = "model.safetensors.index.json"
_WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?$")


def save_model(
    module: torch.nn.Module,
    folder: Path | str,
    ranks: Ranks,
    *,
    shard_bytes: int = SHARD_BYTES,
    on_each_node: bool = False,
) -> None:
    """Write weights, ``config.json`` and ``generation_config.json``; a collective of all ranks.

    Weights are those the engine trains with, in its format; tied weights are written once. A plain
    ``nn.Module`` gets ``model.safetensors`` alone, a PEFT model what ``peft`` reads: its adapters.

    Args:
        module: the model.
        folder: where to write.
        ranks: facts of this process.
        shard_bytes: the largest weight file; a larger tensor has one of its own.
        on_each_node: write all of it on every machine, which has a disk of its own there.

    Raises:
        ModelError: the folder cannot be written; raised on every rank.
    """
    target = Path(folder)
    ranks = ranks.on_machine() if on_each_node else ranks
    with all_or_none():
        if ranks.is_main:
            _make_folder(target)
    if has_adapters(module):
        save_adapters(module, target, ranks)
        return
    shards = plan_shards(groups_of(module), shard_bytes)
    names = shard_names(len(shards))
    writers = list(range(ranks.world_size)) if on_each_node else _writers(target, ranks)
    mine = [i for i in range(len(shards)) if writers[i % len(writers)] == ranks.rank]
    with all_or_none():
        # A failed write is raised after the last gather, so that no rank leaves the others in one.
        _write_shards(shards, names, target, frozenset(mine))
    with all_or_none():
        if ranks.is_main:
            try:
                for name in names:
                    os.replace(_partial(target, name), target / name)
                _finish(target, index_of(shards, names), names)
                _save_configs(module, target)
            except OSError as error:
                raise _unwritable(target, error) from error


def save_configs(module: torch.nn.Module, folder: Path) -> None:
    """Write ``config.json`` and ``generation_config.json`` where the model has them."""
    _save_configs(module, folder)


def copied(entry: Entry) -> torch.Tensor:
    """Return a gathered tensor in host memory of its own."""
    return entry.tensor.detach().to("cpu", copy=True).contiguous()


def _writers(target: Path, ranks: Ranks) -> list[int]:
    """Return the ranks that see the main rank's folder; others have a disk of their own there.

    Weights written to another machine's disk would be lost, so only these ranks write.
    """
    token = target / f".dstrain-writers-{os.getpid() if ranks.is_main else 0}"
    with all_or_none():
        if ranks.is_main:
            try:
                token.touch()
            except OSError as error:
                raise _unwritable(target, error) from error
    token = Path(gather_objects(str(token))[0])
    seen = gather_objects(token.exists())
    if ranks.is_main:
        token.unlink(missing_ok=True)
    return [rank for rank, sees in enumerate(seen) if sees]


def check_writable(folder: Path | str) -> None:
    """Make the folder and prove that a file can be written there.

    Raises:
        ModelError: naming the folder and the system's reason.
    """
    target = Path(folder)
    _make_folder(target)
    probe = target / f".dstrain-write-test-{os.getpid()}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise _unwritable(target, error) from error


def _make_folder(target: Path) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: OSError) -> ModelError:
    return ModelError(
        unwritten(
            f"output_dir {str(target)!r} cannot be written",
            target,
            error,
            remedy="choose another output_dir, or change its permissions",
        )
    )


def _write_shards(
    shards: list[list[Portion]], names: list[str], target: Path, own: frozenset[int]
) -> None:
    """Gather what each shard needs; write the shards ``own`` in a thread while the next fills."""
    failure: BaseException | None = None
    mode = 0o666 & ~_umask()
    with ThreadPoolExecutor(max_workers=1) as writer:
        pending: Future[None] | None = None
        for index, (shard, name) in enumerate(zip(shards, names, strict=True)):
            mine = index in own
            if mine and pending is not None:
                failure = failure or pending.exception()
            whole: dict[str, torch.Tensor] = {}
            entries = [entry for portion in shard for entry in portion.entries]
            for batch in gather_batches(entries):
                with gathered(parameters_of(batch)):
                    if mine:
                        whole |= {e.name: copied(e) for e in batch}
            if mine:
                held: list[Stored] = []
                for portion in shard:
                    held += portion.stored(partial(_picked, whole, portion))
                pending = writer.submit(_write_file, held, _partial(target, name), mode)
        if pending is not None:
            failure = failure or pending.exception()
    if failure is not None:
        if isinstance(failure, OSError):
            raise _unwritable(target, failure) from failure
        raise failure


def _picked(whole: dict[str, torch.Tensor], portion: Portion) -> list[torch.Tensor]:
    """Return the tensors that a portion is made of, which nothing else in its shard needs."""
    return [whole.pop(entry.name) for entry in portion.entries]


def _partial(target: Path, name: str) -> Path:
    """Return the path where a file is written first: a killed save leaves the old file whole."""
    return target / f".{name}.partial"


def _write_file(tensors: list[Stored], path: Path, mode: int) -> None:
    try:
        write_tensor_file(path, tensors, {"format": "pt"})
        path.chmod(mode)
    except Exception as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error


def _umask() -> int:
    """Return this process's umask, which the system tells only when it is set."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _finish(target: Path, content: dict[str, Any], names: list[str]) -> None:
    """Write the index of several shards, then remove weight files of an earlier save."""
    keep = set(names)
    if len(names) > 1:
        unfinished = _partial(target, INDEX)
        unfinished.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        os.replace(unfinished, target / INDEX)
        keep.add(INDEX)
    for path in target.iterdir():
        if _WEIGHT_FILE.fullmatch(path.name) and path.name not in keep:
            path.unlink()


def _save_configs(module: Any, target: Path) -> None:
    config = getattr(module, "config", None)
    if has_adapters(module):
        return  # they have a config of their own
    if config is None or not hasattr(config, "save_pretrained"):
        return
    saved: Any = copy.deepcopy(config)
    saved.architectures = [type(module).__name__]
    formats = (p.dtype for p in module.parameters() if p.is_floating_point())
    saved.dtype = str(next(formats, torch.float32)).removeprefix("torch.")
    saved.save_pretrained(target)
    if getattr(module, "generation_config", None) is not None and module.can_generate():
        try:
            module.generation_config.save_pretrained(target)
        except ValueError as error:  # changed since the Trainer looked at it
            raise ModelError(
                Problem("model.generation_config cannot be saved", str(error), "mend these values")
            ) from error
