"""Access to private parts of transformers and torch, for all of ``dstrain.engine``."""

from __future__ import annotations

from typing import Any

from transformers.integrations import deepspeed as _integration
from transformers.trainer_pt_utils import get_parameter_names

__all__ = ["get_parameter_names", "is_compiled", "register_config", "registered_config"]


def registered_config() -> Any:
    """Return the DeepSpeed config that is registered with transformers, or None.

    transformers builds models partitioned while a config of stage 3 is registered.
    """
    reference = _integration._hf_deepspeed_config_weak_ref
    return None if reference is None else reference()


def register_config(config: Any) -> None:
    """Register a DeepSpeed config with transformers, or remove the registered one (None)."""
    if config is None:
        _integration.unset_hf_deepspeed_config()
    else:
        _integration.set_hf_deepspeed_config(config)


def is_compiled(module: Any) -> bool:
    """Tell whether torch compiles the forward pass of a module or of one of its submodules."""
    return any(getattr(part, "_compiled_call_impl", None) for part in module.modules())
