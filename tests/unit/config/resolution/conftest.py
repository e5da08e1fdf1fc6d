"""DeepSpeed's own reader of configs."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest

from dstrain.config import ResolvedConfig


@pytest.fixture(scope="module")
def deepspeed_config_module() -> Any:
    """Give DeepSpeed's own reader of configs, on a machine with or without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        from deepspeed.runtime import config

    return config


@pytest.fixture(scope="module")
def accepted_by_deepspeed(deepspeed_config_module) -> Callable[[ResolvedConfig], Any]:
    """Read a resolved config with DeepSpeed's own reader, as in a group of that many ranks."""

    def read(got: ResolvedConfig) -> Any:
        ranks = types.SimpleNamespace(
            get_rank=lambda: 0, get_world_size=lambda: got.facts.world_size
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deepspeed_config_module, "dist", ranks)
            return deepspeed_config_module.DeepSpeedConfig(got.to_deepspeed())

    return read
