"""The semi-private parts of transformers and torch that this room uses, in one place."""

from __future__ import annotations

from typing import Any

from transformers.integrations import deepspeed as _integration
from transformers.trainer_pt_utils import get_parameter_names

__all__ = ["get_parameter_names", "is_compiled", "register_config", "registered_config"]


def registered_config() -> Any:
    """Return the config by which transformers builds partitioned models, or None."""
    reference = _integration._hf_deepspeed_config_weak_ref
    return None if reference is None else reference()


def register_config(config: Any) -> None:
    """Make transformers build models by ``config`` from now on, or whole ones for None."""
    if config is None:
        _integration.unset_hf_deepspeed_config()
    else:
        _integration.set_hf_deepspeed_config(config)


def is_compiled(module: Any) -> bool:
    """Tell whether the forward pass of a module or of a part of it is compiled by torch."""
    return any(getattr(part, "_compiled_call_impl", None) for part in module.modules())
