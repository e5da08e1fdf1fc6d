"""Registry of the engines of this process, so that no two engines train the same parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from dstrain.config import ResolvedConfig
from dstrain.core.errors import Problem, TrainingError


class LiveEngine(Protocol):
    """An engine as code sees it that finds it in the registry instead of building it.

    Attributes:
        module: the model.
        resolved: the config that the engine was built from.
        in_use: whether a training is running, so that the engine must not be destroyed.
        is_released: whether the engine has removed its hooks and attributes from the module.
        owner: returns the owner's function that closes the engine in good order, or None once the
            owner has been garbage-collected; None if the engine has no owner.
    """

    module: torch.nn.Module
    resolved: ResolvedConfig
    in_use: bool
    is_released: bool
    owner: Callable[[], Callable[[], None] | None] | None

    @property
    def model(self) -> Any:
        """Return the callable that runs a forward pass."""

    def has_interrupted_pass(self) -> bool:
        """Tell whether a forward or backward pass at stage 3 was interrupted."""

    def hand_over(self) -> None:
        """Close the engine by its owner's function, and destroy it, to free the module."""

    def destroy(self) -> None:
        """Release buffers and hooks."""


# Weak references: DeepSpeed's engine references ours, so an engine stays registered as long as a
# hook on its module leads to it. No attribute of the module, since a part of one engine's module
# may be the module of another engine.
_ENGINES: weakref.WeakSet[LiveEngine] = weakref.WeakSet()


def register(engine: LiveEngine) -> None:
    """Add a new engine to the registry."""
    _ENGINES.add(engine)


def unregister(engine: LiveEngine) -> None:
    """Remove a destroyed engine from the registry."""
    _ENGINES.discard(engine)


def any_besides(engine: LiveEngine) -> bool:
    """Tell whether any engine other than this one still has hooks on its module."""
    return any(other is not engine and not other.is_released for other in _ENGINES)


def engine_on(module: torch.nn.Module) -> LiveEngine | None:
    """Return the engine that was built on ``module`` and not released since, or None."""
    found = (e for e in _ENGINES if e.module is module and not e.is_released)
    return next(found, None)


def in_use(module: torch.nn.Module) -> bool:
    """Tell whether a running training changes parameters of ``module``."""
    return any(engine.in_use for engine in _sharing(module))


def destroy_orphans() -> None:
    """Destroy engines whose owners no longer exist; to be called on all ranks at the same point.

    Python cannot collect such engines: parameters and optimizer reference each other through
    torch's gradient hooks, which its garbage collector cannot see.
    """
    for engine in list(_ENGINES):
        if engine.owner is not None and engine.owner() is None:
            engine.destroy()


def hand_over_module(module: torch.nn.Module) -> None:
    """Close and destroy all engines that share parameters with ``module``.

    Raises:
        TrainingError: a training is running on one of these engines.
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

    The time grows with the number of parameters of all engines.
    """
    parameters = set(map(id, module.parameters()))
    for engine in list(_ENGINES):
        if any(id(parameter) in parameters for parameter in engine.module.parameters()):
            yield engine
