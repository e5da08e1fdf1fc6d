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
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dstrain.core.adapters import has_adapters
from dstrain.core.errors import ModelError, Problem
from dstrain.core.ranks import Ranks, all_or_none, gather_objects
from dstrain.engine import full_numel, gathered, is_partitioned
from dstrain.models.adapters import save_adapters

SHARD_BYTES = 5 * 10**9
# Gathering parameters one by one would pay a latency for each; a group stays small beside a shard.
GATHER_BYTES = 256 * 2**20
INDEX = "model.safetensors.index.json"
_WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?$")


@dataclass(frozen=True)
class Entry:
    """One tensor of the saved model under its saved name."""

    name: str
    tensor: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return full_numel(self.tensor) * self.tensor.element_size()


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
    if needs_conversion(module):
        _save_converted(module, target, ranks, shard_bytes)
        return
    entries = entries_of(module)
    shards = plan_shards(entries, shard_bytes)
    names = shard_names(len(shards))
    writers = list(range(ranks.world_size)) if on_each_node else _writers(target, ranks)
    mine = [i for i in range(len(shards)) if writers[i % len(writers)] == ranks.rank]
    with all_or_none():
        # A failed write is raised after the last gather, so that no rank leaves the others in one.
        _write_shards(shards, names, target, frozenset(mine))
    with all_or_none():
        if ranks.is_main:
            weight_map = {e.name: n for n, shard in zip(names, shards, strict=True) for e in shard}
            try:
                for name in names:
                    os.replace(_partial(target, name), target / name)
                _finish(target, weight_map, sum(e.num_bytes for e in entries), names)
                _save_configs(module, target)
            except OSError as error:
                raise _unwritable(target, error) from error


def save_configs(module: torch.nn.Module, folder: Path) -> None:
    """Write ``config.json`` and ``generation_config.json`` where the model has them."""
    _save_configs(module, folder)


def copied(entry: Entry) -> torch.Tensor:
    """A gathered tensor in host memory of its own."""
    return entry.tensor.detach().to("cpu", copy=True).contiguous()


def _writers(target: Path, ranks: Ranks) -> list[int]:
    """The ranks that see the main rank's folder; others have a disk of their own there.

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
        Problem(
            f"output_dir {str(target)!r} cannot be written",
            f"{error.strerror or error}",
            "choose another output_dir, or change its permissions",
        )
    )


def entries_of(module: torch.nn.Module) -> list[Entry]:
    """Parameters and persistent buffers in module order, each shared tensor under one name."""
    tied_away = set(getattr(module, "all_tied_weights_keys", None) or ())
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    entries = []
    for key, aliases in names.items():
        kept = next((n for n in aliases if n not in tied_away), aliases[0])
        entries.append(Entry(kept, tensors[key]))
    persistent = module.state_dict(keep_vars=True)
    entries += [Entry(n, b) for n, b in module.named_buffers() if n in persistent]
    return entries


def plan_shards(entries: list[Entry], shard_bytes: int) -> list[list[Entry]]:
    """Fill shards in order; a tensor larger than a shard has one of its own."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.num_bytes
    return shards


def shard_names(count: int) -> list[str]:
    """File names of that many shards."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _write_shards(
    shards: list[list[Entry]], names: list[str], target: Path, own: frozenset[int]
) -> None:
    """Gather every parameter once; write the shards ``own`` in a thread while the next fills."""
    failure: BaseException | None = None
    mode = 0o666 & ~_umask()
    with ThreadPoolExecutor(max_workers=1) as writer:
        pending: Future[None] | None = None
        for index, (shard, name) in enumerate(zip(shards, names, strict=True)):
            mine = index in own
            if mine and pending is not None:
                failure = failure or pending.exception()
            held: dict[str, torch.Tensor] = {}
            for group in gather_groups(shard):
                with gathered(e.tensor for e in group if isinstance(e.tensor, torch.nn.Parameter)):
                    if mine:
                        for e in group:
                            held[e.name] = copied(e)
            if mine:
                pending = writer.submit(_write_file, held, _partial(target, name), mode)
        if pending is not None:
            failure = failure or pending.exception()
    if failure is not None:
        if isinstance(failure, OSError):
            raise _unwritable(target, failure) from failure
        raise failure


def gather_groups(shard: list[Entry]) -> Iterator[list[Entry]]:
    """Neighbours that are gathered together."""
    group: list[Entry] = []
    size = 0
    for entry in shard:
        if group and is_partitioned(entry.tensor) and size + entry.num_bytes > GATHER_BYTES:
            yield group
            group, size = [], 0
        group.append(entry)
        size += entry.num_bytes if is_partitioned(entry.tensor) else 0
    if group:
        yield group


def _partial(target: Path, name: str) -> Path:
    """Where a file is written before it takes its place: a killed save leaves the old one whole."""
    return target / f".{name}.partial"


def _write_file(tensors: dict[str, torch.Tensor], path: Path, mode: int) -> None:
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)  # safetensors makes files that only their owner can read
    except Exception as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error


def _umask() -> int:
    """This process's umask; the system only tells it when it is set."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _finish(target: Path, weight_map: dict[str, str], total_bytes: int, names: list[str]) -> None:
    """Write the index of several shards, then remove weight files of an earlier save."""
    keep = set(names)
    if len(names) > 1:
        index = INDEX
        partial = _partial(target, index)
        content = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        os.replace(partial, target / index)
        keep.add(index)
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
    saved.dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    saved.save_pretrained(target)
    if getattr(module, "generation_config", None) is not None and module.can_generate():
        try:
            module.generation_config.save_pretrained(target)
        except ValueError as error:  # changed since the Trainer looked at it
            raise ModelError(
                Problem("model.generation_config cannot be saved", str(error), "mend these values")
            ) from error


def needs_conversion(module: torch.nn.Module) -> bool:
    """Whether transformers stores this architecture in another layout than it trains it in."""
    if not hasattr(module, "save_pretrained"):
        return False
    from dstrain.models.compat import save_conversions

    return bool(save_conversions(module))


def _save_converted(module: Any, target: Path, ranks: Ranks, shard_bytes: int) -> None:
    """The path of architectures whose layout is converted (merged experts and the like).

    The conversion is transformers' own and needs tensors together, so rank 0 holds the whole model
    in host memory here.
    """
    held: dict[str, torch.Tensor] = {}
    for group in gather_groups(entries_of(module)):
        with gathered(e.tensor for e in group if isinstance(e.tensor, torch.nn.Parameter)):
            if ranks.is_main:
                for e in group:
                    held[e.name] = copied(e)
    with all_or_none():
        if ranks.is_main:
            try:
                module.save_pretrained(target, state_dict=held, max_shard_size=shard_bytes)
            except OSError as error:
                raise _unwritable(target, error) from error
