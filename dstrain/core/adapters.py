"""PEFT's wrapper around a model, told by what it has, so that peft need not be installed."""

from __future__ import annotations

from typing import Any


def has_adapters(module: Any) -> bool:
    """Whether ``module`` is a ``peft.PeftModel``: small trained parts on a frozen model."""
    return hasattr(module, "peft_config") and hasattr(module, "get_base_model")


def inner_model(module: Any) -> Any:
    """The model below PEFT's wrapper, whose ``forward`` says what it takes; else itself."""
    return module.get_base_model() if has_adapters(module) else module
