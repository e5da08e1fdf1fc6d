"""Keeping the engine of a model: a new one per training, a light one for evaluation alone."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator

import torch

from dstrain.config import ResolvedConfig
from dstrain.core.errors import ConfigError, Problem
from dstrain.engine import (
    Engine,
    destroy_orphans,
    device_name,
    device_type,
    engine_on,
    hand_over_module,
    in_use,
    inference_engine,
    is_partitioned,
    make_whole,
)
from dstrain.models import DTYPES, guard_partitioned, release_guard


class EngineKeeper:
    """Owns the engine of one module: train and evaluate work in any order, any number of times."""

    def __init__(self, close: Callable[[], None], *, patience_seconds: float) -> None:
        """Begin without an engine.

        Args:
            close: the method that tears the engine down in good order; called where another
                Trainer needs the module.
            patience_seconds: how long a rank that generates waits for the others at stage 3.
        """
        self._close = weakref.WeakMethod(close)
        self._patience = patience_seconds
        self._training: Engine | None = None
        self._inference: Engine | None = None

    @property
    def training(self) -> Engine | None:
        """Return the engine of the training that runs or ran last; None once it was torn down."""
        engine = self._training
        return None if engine is None or engine.is_destroyed else engine

    def train(self, build: Callable[[], Engine]) -> Engine:
        """Tear down what is alive and build a training engine on the current weights."""
        self._tear_down()
        gc.collect()  # those of other Trainers, which nobody holds any more, must be gone too
        destroy_orphans()
        engine = self._training = self._adopted(build())
        engine.in_use = True
        return engine

    def settle(self, *, done: bool) -> None:
        """Make the module usable after a training.

        Args:
            done: whether the training came to its end. At stage 3 an engine that broke off in the
                middle of a pass is torn down, as it cannot go on.
        """
        engine = self.training
        if engine is None:
            return
        engine.release_module()
        close = self._close()
        if not done and not engine.is_released and close is not None:
            close()

    def forward_model(self, module: torch.nn.Module, resolved: ResolvedConfig) -> torch.nn.Module:
        """Return what to call for a forward pass without training.

        The engine that is alive on the module, whoever trains with it. Before training at stage 3
        an engine without optimizer, which gathers partitioned parameters; below stage 3 the module
        itself, on the device and in the format that training gives it.
        """
        alive = engine_on(module)
        if alive is not None:
            return alive.model
        if resolved.stage == 3:
            self._inference = self._adopted(inference_engine(module, resolved))
            return self._inference.model
        if not in_use(module):  # by a training of another module with the same parameters
            _place(module, resolved)
        return module

    def precision(self, module: torch.nn.Module, resolved: ResolvedConfig) -> str:
        """Return the number format that ``forward_model`` computes in."""
        alive = engine_on(module)
        return (resolved if alive is None else alive.resolved).precision

    def autocast(
        self, module: torch.nn.Module, resolved: ResolvedConfig
    ) -> contextlib.AbstractContextManager[object]:
        """Return the autocast context of an engine; an empty one where an engine is alive."""
        autocasts = resolved.autocasts and engine_on(module) is None
        if not autocasts:
            return contextlib.nullcontext()
        return torch.autocast(device_type(), dtype=DTYPES[resolved.compute_format])

    @contextlib.contextmanager
    def passes(self, module: torch.nn.Module) -> Iterator[None]:
        """Run forward passes in the block; tear down an engine in which one breaks off at stage 3.

        While training runs that is left to its end.
        """
        try:
            yield
        except BaseException:
            engine = engine_on(module)
            if engine is not None and not engine.in_use and engine.has_interrupted_pass():
                engine.hand_over()
            raise

    def close(self) -> None:
        """Tear down every engine; the module keeps its weights."""
        if self._tear_down():
            # Engines hold reference cycles with hooks: their buffers are free only after this.
            gc.collect()

    def _adopted(self, engine: Engine) -> Engine:
        engine.owner = self._close
        guard_partitioned(engine.module, patience_seconds=self._patience)
        return engine

    def _tear_down(self) -> bool:
        """Tear down the engines that are alive, and tell whether there was any."""
        alive = [
            e for e in (self._training, self._inference) if e is not None and not e.is_destroyed
        ]
        for engine in alive:
            engine.destroy()
        self._training = self._inference = None
        return bool(alive)


def check_parts(module: torch.nn.Module, resolved: ResolvedConfig) -> None:
    """Refuse a partitioned model where it would have to be whole.

    Raises:
        ConfigError: the model is partitioned and the stage is not 3.
    """
    if resolved.stage != 3 and any(is_partitioned(p) for p in module.parameters()):
        raise ConfigError(
            Problem(
                f"zero_stage={resolved.stage} with a model that is partitioned over the ranks",
                "it was built in dstrain.partitioned(args), or trained at stage 3",
                "set zero_stage to 3, or call close(whole=True) of the Trainer that trained it",
            )
        )


def make_ordinary(module: torch.nn.Module, device: str | None) -> None:
    """Make a partitioned model whole on every rank; a collective.

    Args:
        module: the model; engines on it are torn down.
        device: where its weights are put; None leaves them on the device of training.

    Raises:
        TrainingError: a training with it is running.
    """
    hand_over_module(module)
    make_whole(module, device_name() if device is None else device)
    release_guard(module)
    vars(module).pop("num_parameters", None)  # count_whole_parameters


def _place(module: torch.nn.Module, resolved: ResolvedConfig) -> None:
    dtype, device = DTYPES[resolved.precision], device_name()
    module.to(device)
    if resolved.precision == "fp32":
        return  # trained in the formats that it has
    for parameter in module.parameters():
        # Buffers stay as they are: rotary frequencies in 16 bits would be wrong.
        if parameter.dtype in DTYPES.values() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
