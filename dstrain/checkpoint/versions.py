"""Versions of the libraries that a checkpoint was written with."""

from __future__ import annotations

from dstrain.core.versions import installed, python_version

_LIBRARIES = ("dstrain", "torch", "deepspeed", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that are installed."""
    return {"python": python_version(), **installed(_LIBRARIES)}
