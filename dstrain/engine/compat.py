"""The semi-private parts of transformers that this room uses, in one place."""

from __future__ import annotations

from typing import Any

from transformers.integrations import deepspeed as _integration
from transformers.trainer_pt_utils import get_parameter_names

__all__ = ["get_parameter_names", "register_config", "registered_config"]


def registered_config() -> Any:
    """Return what transformers builds partitioned models by, or None; its reference is weak."""
    reference = _integration._hf_deepspeed_config_weak_ref
    return None if reference is None else reference()


def register_config(config: Any) -> None:
    """Make transformers build models by ``config`` from now on, or whole ones for None."""
    if config is None:
        _integration.unset_hf_deepspeed_config()
    else:
        _integration.set_hf_deepspeed_config(config)
