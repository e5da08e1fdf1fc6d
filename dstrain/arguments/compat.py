"""Access to the one name of transformers that arguments need, imported when it is used."""

from __future__ import annotations

from typing import Any


def parallel_mode(name: str) -> Any:
    """Return a member of transformers' ``ParallelMode``, which its callbacks compare with."""
    from transformers.training_args import ParallelMode

    return ParallelMode[name]
