"""Access to the only name of transformers that the arguments need, imported on demand."""

from __future__ import annotations

from typing import Any


def parallel_mode(name: str) -> Any:
    """Return a member of transformers' ``ParallelMode``, with which its callbacks compare."""
    from transformers.training_args import ParallelMode

    return ParallelMode[name]
