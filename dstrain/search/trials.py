"""Hyperparameter search: what a backend asks of a training, and how ranks follow the main one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

from dstrain.arguments import TrainingArguments
from dstrain.core.errors import ConfigError, Problem, TrainingError, nearest
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, broadcast_object

logger = get_logger(__name__)

T = TypeVar("T", bound=TrainingArguments)

# In the order in which one is chosen. sigopt is documented, but its service no longer exists.
_PACKAGES = {"optuna": "dstrain[tune]", "ray": "'ray[tune]'", "wandb": "dstrain[wandb]"}


@dataclass(frozen=True)
class Trials:
    """Holds what a backend needs to run its trials.

    Attributes:
        ranks: rank and world size of this process.
        run: (trial, its name) -> objective, from one training with it; a collective of all ranks.
        space: the hyperparameters of a trial (optuna), or without a trial the space itself.
        is_over: whether a signal asks to begin no further trial; the same on all ranks.
    """

    ranks: Ranks
    run: Callable[[Any, str], Any]
    space: Callable[[Any], Any]
    is_over: Callable[[], bool]


class SearchStopped(BaseException):
    """Raised on all ranks by a trial that a signal ended, or by one that it kept from beginning.

    Like ``KeyboardInterrupt`` it is no ``Exception``: after a trial that failed, a search may go
    on, and this is none.
    """


@dataclass(frozen=True)
class Ended:
    """Tells that the search is over, with its result or the failure that ended it."""

    result: Any = None
    failure: str = ""


def default_objective(metrics: Mapping[str, float]) -> float:
    """Return the sum of the metrics, or the evaluation loss where there is no other metric.

    Times, speeds and memory are no metrics of the model.
    """
    ends = ("_runtime", "_per_second", "_preparation_time")
    others = {
        name: value
        for name, value in metrics.items()
        if name not in ("eval_loss", "epoch", "num_input_tokens_seen")
        and not name.endswith(ends)
        and "_mem_" not in name
    }
    return sum(others.values()) if others else metrics["eval_loss"]


def hyperparameters_of(trial: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters in a trial that is a mapping, without a backend's own entries."""
    return {k: v for k, v in trial.items() if k not in ("wandb", "assignments", "metric")}


def with_values(args: T, values: Mapping[str, Any]) -> T:
    """Return a checked copy of ``args`` with other values; warn of names that are no argument.

    Raises:
        ConfigError: values that cannot be used.
    """
    changed = copy.copy(args)
    known = {field.name for field in dataclasses.fields(args)}
    for name, value in plain_values(values).items():
        if name not in known:
            close = nearest(name, known)
            logger.warning(
                "hyperparameter %s is no argument, so only model_init can use it%s",
                name,
                f" (did you mean {close}?)" if close else "",
            )
            continue
        old = getattr(args, name)
        # A sampler may draw a float where an argument is whole.
        if isinstance(old, int) and not isinstance(old, bool) and isinstance(value, float):
            value = int(value)
        setattr(changed, name, value)
    changed.validate()
    return changed


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values of array libraries to Python's own."""
    return {n: v.item() if hasattr(v, "item") else v for n, v in values.items()}


def tell(order: object) -> None:
    """Tell the other ranks, from the main rank, which trial comes next; a collective."""
    broadcast_object(order)


def follow(trials: Trials, trial_of: Callable[[Any], tuple[Any, str]]) -> Any:
    """Run, on the other ranks, what the main rank tells until the search is over.

    Args:
        trials: runs one trial.
        trial_of: what was told -> trial and its name.

    Raises:
        Exception: what ended the search.
    """
    failure: Exception | None = None
    while True:
        order = broadcast_object(None)
        if isinstance(order, Ended):
            if order.failure:
                raise failure or TrainingError(Problem("the search failed", order.failure))
            return order.result
        failure = None
        try:
            trials.run(*trial_of(order))
        except SearchStopped:  # the main rank has still to say what is best
            continue
        except Exception as error:  # the main rank's backend decides what becomes of it
            failure = error


def backend_named(wanted: object) -> str:
    """Return the name of the backend to use; by default the first that is installed.

    Args:
        wanted: a name, a member of transformers' ``HPSearchBackend``, or None.

    Raises:
        ConfigError: unknown, gone, or not installed.
    """
    if wanted is None:
        found = [name for name in _PACKAGES if find_spec(name)]
        if not found:
            commands = ", ".join(f"pip install {package}" for package in _PACKAGES.values())
            raise ConfigError(
                Problem("hyperparameter_search", "no backend is installed", f"one of: {commands}")
            )
        return found[0]
    name = str(getattr(wanted, "value", wanted)).lower()
    if name == "sigopt":
        raise ConfigError(
            Problem(
                "backend='sigopt'",
                "its service was shut down, and transformers 5 removed it",
                "use optuna (pip install 'dstrain[tune]')",
            )
        )
    if name not in _PACKAGES:
        raise ConfigError(
            Problem(f"backend={name!r}", "no such backend", f"one of {', '.join(_PACKAGES)}")
        )
    if find_spec(name) is None:
        raise ConfigError(
            Problem(f"backend={name!r}", "it is not installed", f"pip install {_PACKAGES[name]}")
        )
    return name


def default_space(backend: str) -> Callable[[Any], Any]:
    """Return transformers' search space for a backend: learning rate, epochs, seed, batch size."""
    from dstrain.search import compat

    spaces: dict[str, Callable[[Any], Any]] = {
        "optuna": compat.default_hp_space_optuna,
        "ray": compat.default_hp_space_ray,
        "wandb": compat.default_hp_space_wandb,
    }
    return spaces[backend]
