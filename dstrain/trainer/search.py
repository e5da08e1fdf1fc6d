"""Hyperparameter search: one trial on all ranks, with a config and an engine of its own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dstrain.arguments import TrainingArguments
from dstrain.core.errors import ConfigError, Problem, TrainingError, nearest
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, all_or_none, from_main, gather_objects
from dstrain.models import check_writable
from dstrain.trainer import compat

logger = get_logger(__name__)

# In the order in which one is chosen. sigopt is documented, but its service no longer exists.
_PACKAGES = {"optuna": "dstrain[tune]", "ray": "'ray[tune]'", "wandb": "dstrain[wandb]"}


class SearchHooks:
    """The methods of transformers' Trainer about a search.

    Attributes:
        hp_search_backend: its name while a search runs, else None.
        hp_space: of the search: a trial -> hyperparameters.
        hp_name: of the search: a trial -> its name, or None.
        compute_objective: of the search: metrics -> what is optimised.
        objective: of the trial, once one of its evaluations is over.
        prunes: whether the search may give a trial up, which it cannot with several objectives.
    """

    args: Any
    state: Any
    ranks: Ranks
    events: Any
    model_init: Any
    train: Any
    evaluate: Any
    close: Any
    hp_search_backend: str | None = None
    hp_space: Callable[[Any], Any] | None = None
    hp_name: Callable[[Any], str] | None = None
    compute_objective: Callable[[dict[str, float]], Any] | None = None
    objective: Any = None
    prunes: bool = True
    _trial: Any = None
    _trial_id: str = ""
    _args_outside: TrainingArguments | None = None
    _give_back_callbacks: Callable[[], None] | None = None

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], Any] | None = None,
        compute_objective: Callable[[dict[str, float]], Any] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        backend: Any = None,
        hp_name: Callable[[Any], str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Train with different arguments and find the best; all ranks must call it.

        Each trial starts from ``args`` as they are, with its hyperparameters in place of theirs,
        and writes into a folder of its own, ``output_dir/run-<number>`` or what ``hp_name`` says.
        In each, and after the search, early stopping and other callbacks whose state a checkpoint
        would hold begin as they were before.
        The main rank asks the backend; what it decides holds on all ranks.

        Args:
            hp_space: a trial -> names of arguments and their values (optuna), or without a trial
                the space itself (ray, wandb); by default learning rate, epochs, seed, batch size.
            compute_objective: metrics of an evaluation -> what is optimised; by default the loss,
                or the sum of all other metrics where there are any.
            n_trials: how many trainings.
            direction: "minimize" or "maximize"; a list for as many objectives (optuna).
            backend: "optuna", "ray" or "wandb"; by default the first of them that is installed.
            hp_name: a trial -> the name of its folder and in trackers.
            **kwargs: of ``optuna.create_study`` and its ``optimize`` (timeout, catch,
                gc_after_trial), of ``ray.tune.run``, or of ``wandb.sweep``.

        Returns:
            ``BestRun(run_id, objective, hyperparameters, run_summary)`` on every rank; a list of
            the best trade-offs for several objectives.

        Raises:
            ConfigError: no ``model_init``, or a backend that is not installed or cannot do this.
        """
        name = _backend(backend)
        if self.model_init is None:
            raise ConfigError(
                Problem(
                    "hyperparameter_search without model_init",
                    "every trial starts from a new model",
                    "pass model_init to the Trainer instead of model",
                )
            )
        run, default_space = _runner(name)
        self.hp_search_backend, self.hp_name = name, hp_name
        self.hp_space = hp_space or default_space
        self.compute_objective = compute_objective or default_objective
        self._give_back_callbacks = self.events.take_down()
        try:
            return run(self, n_trials, direction, **kwargs)
        finally:
            self.hp_search_backend = None
            self._take_up_trial(None)
            self._give_back_callbacks()

    def _take_up_trial(self, trial: Any) -> None:
        """Put a trial's arguments in place, or those from before it."""
        self._leave_trial()
        self._trial = trial
        searching = self.hp_search_backend is not None and trial is not None
        self.state.is_hyper_param_search = searching
        self.state.trial_name = self.state.trial_params = None
        values = self._hyperparameters(trial)
        if not searching and not values:
            return
        self._args_outside = self.args
        if searching:
            name = f"run-{self._trial_id}" if self.hp_name is None else self.hp_name(trial)
            values = {"output_dir": str(Path(self.args.output_dir) / name), **values}
            self.state.trial_name = name
            self.state.log_history = []
        self.args = with_values(self.args, values)
        self.state.trial_params = _plain(values)
        with all_or_none():
            if self.ranks.is_main:
                check_writable(self.args.output_dir)
                logger.warning("trial %s: %s", self._trial_id, self.state.trial_params)

    def _leave_trial(self) -> None:
        """Put the arguments from before a trial back."""
        if self._args_outside is not None:
            self.args, self._args_outside = self._args_outside, None

    def _hyperparameters(self, trial: Any) -> dict[str, Any]:
        if isinstance(trial, dict):
            return {k: v for k, v in trial.items() if k not in ("wandb", "assignments", "metric")}
        if trial is None or self.hp_search_backend is None or self.hp_space is None:
            return {}
        return dict(self.hp_space(trial))

    def _report_trial(self, metrics: dict[str, float]) -> None:
        """Tell the backend of an evaluation during a trial; all ranks stop where it says so."""
        if self.hp_search_backend is None or self._trial is None:
            return
        self.objective = self._objective_of(metrics)
        if self.hp_search_backend == "optuna":
            from dstrain.trainer.search_optuna import prune_if_told

            prune_if_told(self)
        elif self.hp_search_backend == "ray":
            from dstrain.trainer.search_elsewhere import report_to_ray

            report_to_ray(self, metrics)

    def _objective_of(self, metrics: dict[str, float]) -> Any:
        assert self.compute_objective is not None
        compute = self.compute_objective
        return from_main(self.ranks, lambda: compute(dict(metrics)))


def default_objective(metrics: dict[str, float]) -> float:
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


def with_values(args: TrainingArguments, values: dict[str, Any]) -> TrainingArguments:
    """Return a checked copy of ``args`` with other values; warn of names that are no argument.

    Raises:
        ConfigError: values that cannot be used.
    """
    changed = copy.copy(args)
    known = {field.name for field in dataclasses.fields(args)}
    for name, value in _plain(values).items():
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


@dataclass(frozen=True)
class Ended:
    """The search is over: its result, or what ended it."""

    result: Any = None
    failure: str = ""


def run_trial(trainer: Any, trial: Any, trial_id: str) -> Any:
    """Train and evaluate with a trial, and return its objective; a collective of all ranks."""
    trainer._trial_id, trainer.objective = trial_id, None
    trainer._give_back_callbacks()
    try:
        trainer.train(trial=trial)
        if trainer.objective is None:  # no evaluation during training
            trainer.objective = trainer._objective_of(trainer.evaluate())
        return trainer.objective
    finally:
        trainer.close()
        trainer._leave_trial()


def tell(order: Any) -> None:
    """Tell the other ranks, from the main rank, what comes next."""
    gather_objects(order)


def follow(trainer: Any, trial_of: Callable[[Any], tuple[Any, str]]) -> Any:
    """Run, on the other ranks, what the main rank tells until the search is over.

    Args:
        trainer: whose search it is.
        trial_of: what was told -> trial and its name.

    Raises:
        Exception: what ended the search.
    """
    failure: Exception | None = None
    while True:
        order = gather_objects(None)[0]
        if isinstance(order, Ended):
            if order.failure:
                raise failure or TrainingError(Problem("the search failed", order.failure))
            return order.result
        failure = None
        try:
            run_trial(trainer, *trial_of(order))
        except Exception as error:  # the main rank's backend decides what becomes of it
            failure = error


def _backend(wanted: Any) -> str:
    """Return the name of the backend to use.

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


def _runner(name: str) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    if name == "optuna":
        from dstrain.trainer.search_optuna import run

        return run, compat.default_hp_space_optuna
    from dstrain.trainer import search_elsewhere

    if name == "ray":
        return search_elsewhere.run_ray, compat.default_hp_space_ray
    return search_elsewhere.run_wandb, compat.default_hp_space_wandb


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Convert values of array libraries to Python's own."""
    return {n: v.item() if hasattr(v, "item") else v for n, v in values.items()}
