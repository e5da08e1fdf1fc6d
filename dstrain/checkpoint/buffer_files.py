"""Loading of a checkpoint's buffer files into a model, and the check that they fit it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dstrain.checkpoint import content
from dstrain.checkpoint.files import reading
from dstrain.checkpoint.manifest import Manifest
from dstrain.core.documents import Text, parsed, typed
from dstrain.core.errors import Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks
from dstrain.engine import Engine, Slot, empty_slots_of, slots_of
from dstrain.models import TensorReader

logger = get_logger(__name__)


def load_buffers(
    engine: Engine, folder: Path, manifest: Manifest, ranks: Ranks, *, reshaped: Iterable[str]
) -> None:
    """Load the saved buffers into the module: the shared ones, then those saved by this rank.

    All ranks read the shared files. Where another number of ranks wrote the checkpoint, every rank
    takes the main rank's own buffers. A buffer that the model has not created yet is created; one
    that was None when it was saved is set to None.

    Args:
        engine: engine whose module takes the buffers.
        folder: the checkpoint.
        manifest: its manifest.
        ranks: facts of this process.
        reshaped: names of buffers to restore in the shape and format in which they were saved.
    """
    own, anew = rank_file_of(manifest, ranks), set(reshaped)
    lost: list[str] = []
    for name in (content.BUFFERS, content.OTHER_BUFFERS, own):
        if not _has(folder, manifest, name):
            continue

        def put(slot: Slot, file: TensorReader, in_any_shape: bool = name == own) -> None:
            if slot.is_empty or slot.name in anew:
                slot.replace(file.whole(slot.name))
            elif in_any_shape or file.shape(slot.name) == _shape(slot):
                slot.put(file.whole(slot.name))

        lost += _read_into(engine, folder / name, put)
    lost = list(dict.fromkeys(lost))
    if lost and ranks.is_main:
        logger.warning("%s has buffers that this model has no place for: %s", folder, lost[:5])
    engine.buffers.note_values()


def load_shared_buffers(engine: Engine, folder: Path, manifest: Manifest) -> None:
    """Load the shared persistent buffers, so that their shapes fit the files DeepSpeed loads."""
    if _has(folder, manifest, content.BUFFERS):
        _read_into(
            engine,
            folder / content.BUFFERS,
            lambda slot, file: slot.replace(file.whole(slot.name)),
        )


def _read_into(engine: Engine, path: Path, put: Callable[[Slot, TensorReader], None]) -> list[str]:
    """Read a file of buffers into the module; set buffers that were saved as None to None.

    Args:
        engine: engine of the module.
        path: the file.
        put: sets a buffer from the file.

    Returns:
        Names of buffers in the file that the module does not register.
    """
    # Looked up for each file: a file may create a buffer that the next file has values for.
    there = _places(engine)
    lost = []
    with reading(path) as file:
        for buffer in file.keys():  # noqa: SIM118 - a file is no dict
            if buffer in there:
                put(there[buffer], file)
            else:
                lost.append(buffer)
        for buffer in _empty_in(file):
            if buffer in there:
                there[buffer].replace(None)
    return lost


def reshaped_in(run: Mapping[str, Any], engine: Engine) -> set[str]:
    """Return names of buffers whose shape or format the saved run or this run has changed.

    Args:
        run: result of ``read_run``; empty for a checkpoint without ``run.json``.
        engine: engine of this run.
    """
    found = run.get("engine", {}).get("buffers") or {}
    return {*found.get("reshaped", ()), *engine.buffers.found()["reshaped"]}


def misfitting_buffers(
    engine: Engine, folder: Path, manifest: Manifest, ranks: Ranks, *, reshaped: Iterable[str]
) -> list[Problem]:
    """Return a problem for each saved buffer whose shape differs from the model's.

    Buffers whose shape training has changed are left out.

    Args:
        engine: engine of the module.
        folder: the checkpoint.
        manifest: its manifest.
        ranks: facts of this process.
        reshaped: names of buffers whose shape training has changed.
    """
    there = {slot.name: slot for slot in slots_of(engine.module)}
    own = set(reshaped)
    if _has(folder, manifest, rank_file_of(manifest, ranks)):
        with reading(folder / rank_file_of(manifest, ranks)) as file:
            own |= set(file.keys())
    problems = []
    for name in (content.BUFFERS, content.OTHER_BUFFERS):
        if not _has(folder, manifest, name):
            continue
        with reading(folder / name) as file:
            for buffer in file.keys():  # noqa: SIM118 - a file is no dict
                if buffer not in there or buffer in own:
                    continue
                here, saved = _shape(there[buffer]), file.shape(buffer)
                if here != saved:
                    problems.append(
                        Problem(
                            f"the buffer {buffer} has shape {here}, in the checkpoint {saved}",
                            "",
                            "resume with the same model",
                        )
                    )
    return problems


def rank_file_of(manifest: Manifest, ranks: Ranks) -> str:
    """Return the buffer file for this rank: its own if as many ranks wrote them, else rank 0's."""
    same = manifest.world_size == ranks.world_size
    return content.buffer_file(ranks.rank if same else 0)


def _places(engine: Engine) -> dict[str, Slot]:
    slots = [*slots_of(engine.module), *empty_slots_of(engine.module)]
    return {slot.name: slot for slot in slots}


_Names: Any = list[Text]


def _empty_in(file: TensorReader) -> list[str]:
    """Read the names of the buffers that were saved as None; older files list none.

    Raises:
        ValueError: the entry is not a list of names.
    """
    names: list[str] = typed(parsed(file.metadata.get(content.EMPTY, "[]").encode()), _Names)
    return names


def _has(folder: Path, manifest: Manifest, name: str) -> bool:
    """Tell whether a file is part of the checkpoint and exists in this folder.

    It may be a file of another machine that was copied here.
    """
    return manifest.has(name) and (folder / name).exists()


def _shape(slot: Slot) -> tuple[int, ...]:
    return tuple(slot.tensor.shape)
