"""Opening the tensor files of a checkpoint, with one error for all that can be wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dstrain.core.documents import unreadable
from dstrain.models import TensorReader


@contextlib.contextmanager
def reading(path: Path) -> Iterator[TensorReader]:
    """Open a file of tensors, of which runs are read into memory.

    Raises:
        CheckpointError: it is damaged or not there; also where reading inside the block finds that.
    """
    try:
        with TensorReader(path) as file:
            yield file
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(path, error) from error


@contextlib.contextmanager
def mapping(path: Path) -> Iterator[Any]:
    """Open a file of tensors that stay in it, mapped into memory until their values are used.

    Raises:
        CheckpointError: it is damaged or not there; also where reading inside the block finds that.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error
