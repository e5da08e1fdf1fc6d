"""Construction of optimizers from the config, and of the compiled ops that they need."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from dstrain.config import ResolvedConfig
from dstrain.core.errors import ConfigError, Problem, nearest, raise_problems
from dstrain.engine import ops
from dstrain.engine.optimizers.adagrad import make_adagrad_lazy

Factory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def optimizer_class(resolved: ResolvedConfig) -> tuple[type[Any], dict[str, Any]]:
    """Return the optimizer class of the config, and its arguments besides the groups.

    This includes optimizers that DeepSpeed builds by name, so that a caller can build them too.

    Raises:
        ConfigError: the class cannot be imported, or does not take one of the parameters.
    """
    build = resolved.optimizer
    assert build is not None, "a user's own optimizer has no class in the config"
    if build.type == "Muon":
        why = "DeepSpeed builds it itself, from groups that it splits into matrices and others"
        raise ConfigError(
            Problem("Muon as an object", why, "override nothing, and set optim='muon'")
        )
    cls = _import(build.cls)
    given = {
        name: getattr(torch, value) if name.endswith("_dtype") else value
        for name, value in resolved.optimizer_parameters().items()
    }
    if build.type:
        given = _without_switches(build.cls, given)
    taken = inspect.signature(cls.__init__).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    raise_problems(
        [
            Problem(
                f"{name}={value!r} for {build.cls}",
                f"the installed version takes {', '.join(list(taken)[2:])}",
                _suggest(name, list(taken)),
            )
            for name, value in given.items()
            if name not in taken and not anything
        ],
        error=ConfigError,
    )
    return cls, given


def optimizer_factory(resolved: ResolvedConfig) -> Factory | None:
    """Return a function that builds the optimizer from parameter groups.

    Returns:
        None without an optimizer in the config, or where DeepSpeed builds it by name.
    """
    build = resolved.optimizer
    if build is None or (build.type and build.cls != "torch.optim.Adagrad"):
        return None
    cls, given = optimizer_class(resolved)

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = cls(groups, **given)
        make_adagrad_lazy(optimizer)
        return optimizer

    return make


def build_ops(resolved: ResolvedConfig) -> None:
    """Compile the ops of the optimizer before the engine is built, with a message on stderr.

    Raises:
        ConfigError: an op does not compile, or the accelerator has none.
    """
    from deepspeed.git_version_info import installed_ops

    ops.build_ops([name for name in ops_of(resolved) if not installed_ops.get(name, False)])


def ops_of(resolved: ResolvedConfig) -> list[str]:
    """Return the names of DeepSpeed's compiled ops that the optimizer of a run needs."""
    build, values = resolved.optimizer, resolved.values
    if build is None:
        return []
    place = values.get("zero_optimization.offload_optimizer.device", "none")
    names = [build.op] if build.op else []
    torch_adam = values.get("optimizer.params.torch_adam")
    if torch_adam is not None:  # a user's config may ask for torch's Adam or DeepSpeed's
        names = [] if torch_adam else ["fused_adam" if place == "none" else "cpu_adam"]
    return [*names, "async_io"] if place == "nvme" else names


def _import(path: str) -> type[Any]:
    """Import a class by its path.

    Raises:
        ConfigError: it cannot be imported.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            Problem(f"{path} cannot be imported", str(error), f"install {module.split('.')[0]}")
        ) from error


def _without_switches(cls: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return parameters of DeepSpeed's config under the names that a constructor takes.

    Args:
        cls: path of the optimizer's class.
        given: parameters of the config.
    """
    given = dict(given)
    given.pop("torch_adam", None)
    decoupled = given.pop("adam_w_mode", None)
    if decoupled is not None and cls.endswith("DeepSpeedCPUAdam"):
        given["adamw_mode"] = decoupled
    elif decoupled is not None and cls.endswith("FusedAdam"):
        given["adam_w_mode"] = decoupled
    return given


def _suggest(name: str, known: list[str]) -> str:
    """Return a remedy for a parameter that the optimizer does not have."""
    close = nearest(name, known)
    return f"did you mean {close}?" if close else "leave it out"
