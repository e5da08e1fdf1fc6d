"""Saving of a model as a Hugging Face folder, by all ranks and at every ZeRO stage.

Shards are divided among the ranks that can write into the folder. Partitioned parameters are
gathered a few at a time, and only the rank that writes them keeps them, so a rank needs memory for
at most two shards: one being filled and one being written.
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
from dstrain.core.errors import ModelError, Problem, raise_problems
from dstrain.core.files import check_utf8, unwritten
from dstrain.core.ranks import Ranks, all_or_none, broadcast_object, gather_objects
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

    Weights are written in the number format in which the model computes; tied weights once. Of a
    plain ``nn.Module`` only weights are written, of a PEFT model only its adapters, as ``peft``
    saves them.

    Args:
        module: the model.
        folder: where to write.
        ranks: rank of this process, and the number of ranks.
        shard_bytes: maximum size of a weight file; a larger tensor gets a file to itself.
        on_each_node: whether to write the whole model on every machine.

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
        # A failed write is raised after the last gather, in which the other ranks would wait.
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
    """Write ``config.json`` and ``generation_config.json``, if the model has them."""
    _save_configs(module, folder)


def copied(entry: Entry) -> torch.Tensor:
    """Return a contiguous copy of a gathered tensor in host memory."""
    return entry.tensor.detach().to("cpu", copy=True).contiguous()


def _writers(target: Path, ranks: Ranks) -> list[int]:
    """Return the ranks that can see the folder on the main rank's disk; a collective.

    Other ranks must not write: their shards would be on another machine's disk.
    """
    token = target / f".dstrain-writers-{os.getpid() if ranks.is_main else 0}"
    with all_or_none():
        if ranks.is_main:
            try:
                token.touch()
            except OSError as error:
                raise _unwritable(target, error) from error
    token = Path(broadcast_object(str(token)))
    seen = gather_objects(token.exists())
    if ranks.is_main:
        token.unlink(missing_ok=True)
    return [rank for rank, sees in enumerate(seen) if sees]


def check_writable(folder: Path | str) -> None:
    """Create a folder, and check that a file can be written there.

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
    """Create the folder of a model, if there is none."""
    raise_problems(check_utf8("output_dir", target), error=ModelError)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: OSError) -> ModelError:
    """Return the error for a folder that cannot be written."""
    return ModelError(
        unwritten(
            f"output_dir {str(target)!r} cannot be written",
            target,
            error,
            remedy="choose another output_dir, or change its permissions",
        )
    )


def _write_shards(
    shards: list[list[Portion]], names: list[str], target: Path, rank_shards: frozenset[int]
) -> None:
    """Write this rank's shards; a collective of all ranks, which gathers all shards.

    A thread writes one shard while the next is gathered.

    Args:
        shards: all shards of the model.
        names: their file names.
        target: the folder.
        rank_shards: indices of the shards that this rank writes.
    """
    failure: BaseException | None = None
    mode = 0o666 & ~_umask()
    with ThreadPoolExecutor(max_workers=1) as writer:
        pending: Future[None] | None = None
        for index, (shard, name) in enumerate(zip(shards, names, strict=True)):
            mine = index in rank_shards
            if mine and pending is not None:
                failure = failure or pending.exception()
            whole: dict[str, torch.Tensor] = {}
            entries = [entry for portion in shard for entry in portion.entries]
            for batch in gather_batches(entries):
                with gathered(parameters_of(batch)):
                    if mine:
                        whole |= {e.name: copied(e) for e in batch}
            if mine:
                tensors: list[Stored] = []
                for portion in shard:
                    tensors += portion.stored(partial(_picked, whole, portion))
                pending = writer.submit(_write_file, tensors, _partial(target, name), mode)
        if pending is not None:
            failure = failure or pending.exception()
    if failure is not None:
        if isinstance(failure, OSError):
            raise _unwritable(target, failure) from failure
        raise failure


def _picked(whole: dict[str, torch.Tensor], portion: Portion) -> list[torch.Tensor]:
    """Remove and return a portion's tensors; no other portion of the shard needs them."""
    return [whole.pop(entry.name) for entry in portion.entries]


def _partial(target: Path, name: str) -> Path:
    """Return the temporary path of a file, so that an interrupted save keeps the old file."""
    return target / f".{name}.partial"


def _write_file(tensors: list[Stored], path: Path, mode: int) -> None:
    """Write a file of tensors with permissions ``mode``; remove it if that fails.

    Raises:
        OSError: for any failure.
    """
    try:
        write_tensor_file(path, tensors, {"format": "pt"})
        path.chmod(mode)
    except Exception as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error


def _umask() -> int:
    """Return this process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _finish(target: Path, content: dict[str, Any], names: list[str]) -> None:
    """Write the index if there are several shards, and remove weight files of an earlier save.

    Args:
        target: the folder.
        content: content of the index.
        names: file names of the shards.
    """
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
    """Write ``config.json`` and ``generation_config.json``, if the model has them."""
    config = getattr(module, "config", None)
    if has_adapters(module):
        return  # save_adapters has written the config of the adapter
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
        except ValueError as error:  # changed since the Trainer has checked it
            raise ModelError(
                Problem("model.generation_config cannot be saved", str(error), "mend these values")
            ) from error
