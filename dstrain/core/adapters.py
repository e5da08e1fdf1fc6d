"""Recognition of PEFT's wrapper around a model by its attributes, without importing peft."""

from __future__ import annotations

from typing import Any


def has_adapters(module: Any) -> bool:
    """Tell whether ``module`` is a ``peft.PeftModel``: trained adapters on a frozen model."""
    return hasattr(module, "peft_config") and hasattr(module, "get_base_model")


def inner_model(module: Any) -> Any:
    """Return the model inside PEFT's wrapper, whose ``forward`` names the inputs.

    A module without the wrapper is returned as it is.
    """
    return module.get_base_model() if has_adapters(module) else module
