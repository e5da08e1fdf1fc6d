"""Opening of a checkpoint's tensor files, with every failure raised as a ``CheckpointError``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dstrain.core.documents import unreadable
from dstrain.models import TensorReader


@contextlib.contextmanager
def reading(path: Path) -> Iterator[TensorReader]:
    """Open a file of tensors for reading ranges of their elements into memory.

    Raises:
        CheckpointError: the file is missing or damaged; also where reading in the body fails.
    """
    try:
        with TensorReader(path) as file:
            yield file
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(path, error) from error


@contextlib.contextmanager
def mapping(path: Path) -> Iterator[Any]:
    """Open a file of tensors as memory-mapped tensors, whose values are read on use.

    Raises:
        CheckpointError: the file is missing or damaged; also where reading in the body fails.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error
