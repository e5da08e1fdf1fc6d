"""Opening the tensor files of a checkpoint, with one error for all that can be wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from dstrain.core.documents import unreadable
from dstrain.models import TensorReader


@contextlib.contextmanager
def reading(path: Path) -> Iterator[TensorReader]:
    """An open file of slices.

    Raises:
        CheckpointError: it is damaged or not there.
    """
    try:
        with TensorReader(path) as file:
            yield file
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(path, error) from error
