"""Reading of a checkpoint's ``run.json`` and ``rank-N.json``: the run's state except tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Strict

from dstrain.checkpoint import content
from dstrain.checkpoint.codec import decode
from dstrain.checkpoint.manifest import Manifest
from dstrain.core.documents import AtLeastOne, Plain, Text, loaded, parsed, typed, unreadable
from dstrain.core.ranks import Ranks
from dstrain.engine import EngineRecord


def _format(name: str) -> str:
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError("it is no format of torch's")
    return name


States = Mapping[Annotated[str, Strict()], Any]


@dataclass(frozen=True)
class RunDocument:
    """Content of ``run.json``.

    Attributes:
        engine: the engine's state except tensors.
        global_batch_size: samples per step.
        position: the trainer's position in the run.
        formats: parameter name -> dtype, for parameters in another dtype than the run's.
        extra_states: path of a module -> its extra state on the main rank.
    """

    engine: EngineRecord
    global_batch_size: AtLeastOne
    position: Plain
    formats: Mapping[Text, Annotated[str, Strict(), AfterValidator(_format)]] = field(
        default_factory=dict
    )
    extra_states: States = field(default_factory=dict)


def read_run(folder: Path) -> dict[str, Any]:
    """Read ``run.json``: ``RunRecord.shared`` and the engine's progress, shared by all ranks.

    Raises:
        CheckpointError: the file is damaged.
    """
    values: dict[str, Any] = _read(folder / content.RUN, RunDocument)
    return values


def read_rank_state(folder: Path, manifest: Manifest, ranks: Ranks) -> dict[str, Any] | None:
    """Read this rank's ``RunRecord.rank_state``.

    Returns:
        The values; None where another number of ranks wrote the checkpoint, or it was imported.

    Raises:
        CheckpointError: the file is damaged.
    """
    name = content.rank_file(ranks.rank)
    if manifest.world_size != ranks.world_size or not manifest.has(name):
        return None
    values: dict[str, Any] = _read(folder / name, _RankState)
    return values


@dataclass(frozen=True)
class _RankExtras:
    """Entries of a rank's file that are not from ``RunRecord.rank_state``.

    Attributes:
        extra_states: path of a module -> its extra state, where this rank's differs from the main
            rank's.
    """

    extra_states: States = field(default_factory=dict)


def _checked(values: Any) -> Any:
    """Check dstrain's own entries among a rank's values, and return all values."""
    typed(values, _RankExtras)
    return values


_RankState: Any = Annotated[Plain, AfterValidator(_checked)]


def _read(path: Path, kind: Any) -> Any:
    """Read a document that dstrain wrote, and check its values against ``kind``."""
    try:
        values = decode(parsed(loaded(path)))
        typed(values, kind)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    return values
