"""The one name of transformers that the arguments need, on demand."""

from __future__ import annotations

from typing import Any


def parallel_mode(name: str) -> Any:
    """A member of transformers' ``ParallelMode``: its callbacks and search compare against it."""
    from transformers.training_args import ParallelMode

    return ParallelMode[name]
