"""Which engine is alive: a new one per training, none or a light one for evaluation alone."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from dstrain.config import ResolvedConfig
from dstrain.engine import Engine, device_name, inference_engine, is_partitioned
from dstrain.models import DTYPES


class EngineKeeper:
    """Owns the engine of one module: train and evaluate work in any order, any number of times."""

    def __init__(self) -> None:
        """No engine yet."""
        self.training: Engine | None = None
        self._inference: Engine | None = None

    def train(self, build: Callable[[], Engine]) -> Engine:
        """Tear down what is alive and build a training engine on the current weights."""
        self._let_go()
        gc.collect()  # that of another trainer, which nobody holds any more, must be gone too
        self.training = build()
        return self.training

    def forward_model(self, module: torch.nn.Module, resolved: ResolvedConfig) -> Any:
        """What to call for a forward pass without training.

        The training engine where there is one. Before training at stage 3 an engine without
        optimizer, which gathers partitioned parameters; below stage 3 the module itself, on the
        device and in the format that training would give it.
        """
        if self.training is not None:
            return self.training.model
        if resolved.stage == 3 or any(is_partitioned(p) for p in module.parameters()):
            if self._inference is None:
                self._inference = inference_engine(module, resolved)
            return self._inference.model
        return _placed(module, resolved)

    def close(self) -> None:
        """Tear down every engine; the module keeps its weights."""
        if self._let_go():
            # Engines hold reference cycles with hooks: their buffers are free only after this.
            gc.collect()

    def _let_go(self) -> bool:
        """Whether there was an engine, none of which is alive now."""
        alive = [e for e in (self.training, self._inference) if e is not None]
        for engine in alive:
            engine.destroy()
        self.training = self._inference = None
        return bool(alive)


def _placed(module: torch.nn.Module, resolved: ResolvedConfig) -> torch.nn.Module:
    dtype, device = DTYPES[resolved.precision], device_name()
    module.to(device)
    if resolved.precision == "fp32":
        return module  # trained in the formats that it has
    for parameter in module.parameters():
        # Buffers stay as they are: rotary frequencies in 16 bits would be wrong.
        if parameter.dtype in DTYPES.values() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    return module
