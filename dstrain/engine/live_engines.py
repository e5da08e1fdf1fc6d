"""The engines of this process by module: two on one module would change the same parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from dstrain.config import ResolvedConfig
from dstrain.core.errors import Problem, TrainingError


class LiveEngine(Protocol):
    """What code that did not build an engine may use of it.

    Attributes:
        module: the model.
        resolved: the config that the engine was built from.
        in_use: whether a training is running, so that the engine cannot be torn down.
        is_released: whether the module is free of the engine.
        owner: returns the function that tears the engine down in good order, or None once the
            owner is gone.
    """

    module: torch.nn.Module
    resolved: ResolvedConfig
    in_use: bool
    is_released: bool
    owner: Callable[[], Callable[[], None] | None] | None

    @property
    def model(self) -> Any:
        """Return the object to call for a forward pass."""

    def has_interrupted_pass(self) -> bool:
        """Tell whether a pass at stage 3 was interrupted."""

    def hand_over(self) -> None:
        """Release the module for another engine, and tell the owner."""

    def destroy(self) -> None:
        """Release buffers and hooks."""


# Weak: DeepSpeed's engine holds ours, so an engine stays registered as long as a hook leads to it.
# Not an attribute of the module: one engine may be on a part of another engine's module.
_ENGINES: weakref.WeakSet[LiveEngine] = weakref.WeakSet()


def register(engine: LiveEngine) -> None:
    """Keep track of a new engine."""
    _ENGINES.add(engine)


def unregister(engine: LiveEngine) -> None:
    """Remove an engine that has been destroyed."""
    _ENGINES.discard(engine)


def any_besides(engine: LiveEngine) -> bool:
    """Tell whether another engine is on some module."""
    return any(other is not engine and not other.is_released for other in _ENGINES)


def engine_on(module: torch.nn.Module) -> LiveEngine | None:
    """Return the engine that forward passes of ``module`` go through, whoever built it."""
    found = (e for e in _ENGINES if e.module is module and not e.is_released)
    return next(found, None)


def in_use(module: torch.nn.Module) -> bool:
    """Tell whether a training is running that changes parameters of ``module``."""
    return any(engine.in_use for engine in _sharing(module))


def destroy_orphans() -> None:
    """Destroy engines whose owners are gone; to be called on all ranks at the same point.

    Python cannot collect such engines: torch's hooks on gradients hide from the collector that
    parameters and optimizer hold each other.
    """
    for engine in list(_ENGINES):
        if engine.owner is not None and engine.owner() is None:
            engine.destroy()


def hand_over_module(module: torch.nn.Module) -> None:
    """Release ``module`` from all engines that hold its parameters, and tell their owners.

    Raises:
        TrainingError: one of them is in the middle of a training.
    """
    others = list(_sharing(module))
    if any(engine.in_use for engine in others):
        raise TrainingError(
            Problem(
                f"a new engine on {type(module).__name__} while another one trains it",
                "two trainings would change the same parameters",
                "wait for the first train() to end, or give this Trainer a copy of the model made "
                "before it",
            )
        )
    for engine in others:
        engine.hand_over()


def _sharing(module: torch.nn.Module) -> Iterator[LiveEngine]:
    """Yield engines whose modules share a parameter with ``module``.

    The time grows with the number of engines times the number of their parameters.
    """
    parameters = set(map(id, module.parameters()))
    for engine in list(_ENGINES):
        if any(id(parameter) in parameters for parameter in engine.module.parameters()):
            yield engine
