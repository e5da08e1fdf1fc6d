"""``run.json`` and ``rank-N.json`` of a checkpoint: the state of a run beside its tensors."""

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
    """The content of ``run.json``.

    Attributes:
        engine: what the engine has beside its tensors.
        global_batch_size: samples per step.
        position: where the run stands, in the trainer's terms.
        formats: of parameters in another format than the run's.
        extra_states: of modules, by their paths, as the main rank had them.
    """

    engine: EngineRecord
    global_batch_size: AtLeastOne
    position: Plain
    formats: Mapping[Text, Annotated[str, Strict(), AfterValidator(_format)]] = field(
        default_factory=dict
    )
    extra_states: States = field(default_factory=dict)


def read_run(folder: Path) -> dict[str, Any]:
    """Read what all ranks share of a run: ``RunRecord.shared`` and the engine's progress.

    Raises:
        CheckpointError: the file is damaged.
    """
    values: dict[str, Any] = _read(folder / content.RUN, RunDocument)
    return values


def read_rank_state(folder: Path, manifest: Manifest, ranks: Ranks) -> dict[str, Any] | None:
    """Read this rank's ``RunRecord.rank_state``.

    Returns:
        None where another number of ranks wrote the checkpoint, or an import.

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
    """The content of a rank's file beside ``RunRecord.rank_state``.

    Attributes:
        extra_states: of modules, by their paths, where this rank has another than the main rank.
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
