"""Versions of the libraries that a checkpoint was written with."""

from __future__ import annotations

import contextlib
import functools
import platform
from importlib import metadata

_LIBRARIES = ("dstrain", "torch", "deepspeed", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """Of python and of the installed ones."""
    return dict(_versions())


@functools.cache  # reading them takes longer than copying a hundred megabytes of state
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
