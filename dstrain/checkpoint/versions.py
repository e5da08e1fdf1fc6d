"""Versions of the libraries that a checkpoint was written with."""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata

_LIBRARIES = ("dstrain", "torch", "deepspeed", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """Of python and of the installed ones."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
