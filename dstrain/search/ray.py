"""Search with ray, which runs each trial in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dstrain.core.errors import ConfigError, Problem
from dstrain.engine import device_type
from dstrain.search import compat

# Schedulers of ray that go on from another trial's weights, and those that need reports on the way.
_NEED_CHECKPOINTS = ("PopulationBasedTraining", "PB2", "HyperBandForBOHB")
_NEED_REPORTS = (
    "AsyncHyperBandScheduler",
    "ASHAScheduler",
    "HyperBandScheduler",
    "MedianStoppingRule",
)


def check(*, world_size: int, direction: object, scheduler: object, evaluates: bool) -> None:
    """Refuse a search that ray cannot run here.

    Args:
        world_size: ranks of this run.
        direction: of the search.
        scheduler: ray's, or None.
        evaluates: whether a trial evaluates during its training.

    Raises:
        ConfigError: more than one rank, several objectives, or a scheduler that cannot work here.
    """
    name = type(scheduler).__name__
    if world_size > 1:
        raise ConfigError(
            Problem(
                f"backend='ray' on {world_size} ranks",
                "ray starts the processes of its trials itself",
                "start the script as one process, or use optuna, whose trials use all ranks",
            )
        )
    if not isinstance(direction, str):
        raise ConfigError(
            Problem(f"direction={direction!r}", "ray compares one objective", "use optuna")
        )
    if name in _NEED_CHECKPOINTS:
        raise ConfigError(
            Problem(
                f"scheduler={name}",
                "it goes on from another trial's weights, and trials here report none",
                "use ASHAScheduler or no scheduler",
            )
        )
    if name in _NEED_REPORTS and not evaluates:
        raise ConfigError(
            Problem(
                f"scheduler={name} with eval_strategy='no'",
                "it compares trials by their evaluations during training",
                "set eval_strategy to steps or epoch",
            )
        )


def run(
    run_trial: Callable[[dict[str, Any], str], dict[str, Any] | None],
    space: Any,
    n_trials: int,
    direction: str,
    *,
    scope: str | None,
    **kwargs: Any,
) -> Any:
    """Run trials with ``ray.tune.run``.

    Args:
        run_trial: (hyperparameters, name of the trial) -> metrics to report when the trial has
            ended, with their "objective", or None where it has reported itself. It is pickled.
        space: of the search, as ray takes it.
        n_trials: how many trainings.
        direction: "minimize" or "maximize".
        scope: of ray's ``get_best_trial``.
        **kwargs: of ``ray.tune.run``.
    """
    import ray.tune

    if "resources_per_trial" not in kwargs:
        devices = {} if device_type() == "cpu" else {"gpu": 1}
        kwargs["resources_per_trial"] = {"cpu": 1, **devices}
    if "progress_reporter" not in kwargs:
        kwargs["progress_reporter"] = ray.tune.CLIReporter(metric_columns=["objective"])

    def objective(config: dict[str, Any], run_trial: Any = None) -> None:
        metrics = run_trial(dict(config), ray.tune.get_context().get_trial_id())
        if metrics is not None:
            ray.tune.report({**metrics, "done": True})

    analysis = ray.tune.run(
        ray.tune.with_parameters(objective, run_trial=run_trial),
        config=space,
        num_samples=n_trials,
        **kwargs,
    )
    best = analysis.get_best_trial(
        metric="objective", mode=str(direction)[:3], scope=scope or "last"
    )
    return compat.BestRun(best.trial_id, best.last_result["objective"], best.config, analysis)


def report(metrics: Mapping[str, Any], objective: Any) -> None:
    """Report an evaluation during a trial, in the trial's own process."""
    import ray.tune

    ray.tune.report({**metrics, "objective": objective})
