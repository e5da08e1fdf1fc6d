"""Choosing the files of a run's folder that belong on the Hub."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from dstrain.core.log import get_logger
from dstrain.core.secrets import has_secrets

logger = get_logger(__name__)

# Of a checkpoint, what only a resume needs; of a run's folder, what is no part of the model.
_OF_A_RESUME = {"state", "manifest.json", "trainer_state.json"}
_COPY_BYTES = 16 * 2**20
# Settings that a user may have put beside the model; a file larger than this is none.
_SETTINGS_BYTES = 2**20
# Of a model: what is called a token there is one of a vocabulary.
_OF_A_MODEL = ("tokenizer", "vocab", "special_tokens", "added_tokens", "config.json", "merges")


def files_in(folder: Path, *, leave_out: Callable[[Path], bool]) -> dict[str, Path]:
    """Map paths inside a folder to its files; none hidden, nor settings with credentials."""
    found = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if path.is_file() and not hidden and not leave_out(inside):
            if _holds_credentials(path):
                logger.warning("%s is not uploaded: it holds a credential", path)
                continue
            found[inside.as_posix()] = path
    return found


def _holds_credentials(path: Path) -> bool:
    """Tell whether a file holds settings, such as a DeepSpeed config, with a credential in them."""
    if path.suffix != ".json" or path.name.startswith(_OF_A_MODEL):
        return False
    try:
        if path.stat().st_size > _SETTINGS_BYTES:
            return False
        content = json.loads(path.read_bytes())
        return isinstance(content, dict) and has_secrets(content)
    except (OSError, ValueError, RecursionError):
        return False  # uploading it says so


def is_of_a_resume(path: Path) -> bool:
    """Tell whether a path inside a checkpoint is only for a resume, and no part of the model."""
    return path.parts[0] in _OF_A_RESUME


def is_aside(path: Path) -> bool:
    """Tell whether a path of a run's folder is a checkpoint, a trial, private or being written."""
    return path.parts[0].startswith(("_", "checkpoint-", "run-")) or path.suffix == ".partial"


@contextlib.contextmanager
def snapshot(folder: Path) -> Iterator[Path]:
    """Copy a run's folder aside for the block, so that files may change in it meanwhile.

    Large ones are linked: weights are never changed in place, only replaced.
    """
    aside = folder / f".upload-{uuid.uuid4().hex[:8]}"
    try:
        for name, path in files_in(folder, leave_out=is_aside).items():
            copy = aside / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.stat().st_size > _COPY_BYTES:
                try:
                    os.link(path, copy)
                    continue
                except OSError:
                    pass  # a file system without links
            shutil.copyfile(path, copy)
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
