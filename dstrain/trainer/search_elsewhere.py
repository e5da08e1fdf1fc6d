"""Search with ray, which runs each trial in a process of its own, and with sweeps of W&B."""

from __future__ import annotations

import os
from typing import Any

from dstrain.core.errors import ConfigError, Problem, TrainingError
from dstrain.core.log import get_logger
from dstrain.engine import device_type
from dstrain.reporting import tracker_callbacks
from dstrain.reporting.compat import INTEGRATION_TO_CALLBACK
from dstrain.trainer import build, compat
from dstrain.trainer.search import Ended, follow, run_trial, tell, with_values

logger = get_logger(__name__)

# Schedulers of ray that go on from another trial's weights, and those that need reports on the way.
_NEED_CHECKPOINTS = ("PopulationBasedTraining", "PB2", "HyperBandForBOHB")
_NEED_REPORTS = (
    "AsyncHyperBandScheduler",
    "ASHAScheduler",
    "HyperBandScheduler",
    "MedianStoppingRule",
)


def run_ray(trainer: Any, n_trials: int, direction: str | list[str], **kwargs: Any) -> Any:
    """Run trials with ``ray.tune.run``; the trainer goes to each process without its model.

    Raises:
        ConfigError: more than one rank, several objectives, or a scheduler that cannot work here.
    """
    import ray.tune

    _check_ray(trainer, direction, kwargs.get("scheduler"))
    if "resources_per_trial" not in kwargs:
        devices = {} if device_type() == "cpu" else {"gpu": 1}
        kwargs["resources_per_trial"] = {"cpu": 1, **devices}
    if "progress_reporter" not in kwargs:
        kwargs["progress_reporter"] = ray.tune.CLIReporter(metric_columns=["objective"])

    def objective(config: dict[str, Any], local_trainer: Any = None) -> None:
        build.start_run(local_trainer.args)  # this process is a world of its own
        local_trainer._trial_id = ray.tune.get_context().get_trial_id()
        local_trainer.objective = None
        local_trainer.train(trial=dict(config))
        if local_trainer.objective is None:  # no evaluation during training
            metrics = local_trainer.evaluate()
            local_trainer.objective = local_trainer._objective_of(metrics)
            ray.tune.report({**metrics, "objective": local_trainer.objective, "done": True})

    trainer.close()
    outside = trainer.args
    # A trial's process has a working folder of its own.
    trainer.args = with_values(outside, {"output_dir": os.path.abspath(outside.output_dir)})
    # What is not to be pickled, and not needed there: each trial makes its own model.
    board = trainer.pop_callback(INTEGRATION_TO_CALLBACK["tensorboard"])
    trainer.model = None
    trainer.events.hold(None)
    try:
        analysis = ray.tune.run(
            ray.tune.with_parameters(objective, local_trainer=trainer),
            config=trainer.hp_space(None),
            num_samples=n_trials,
            **kwargs,
        )
    finally:
        trainer.args = outside
        trainer._renew_model(None)
        if board is not None:
            trainer.add_callback(board)
    best = analysis.get_best_trial(
        metric="objective", mode=str(direction)[:3], scope=outside.ray_scope or "last"
    )
    return compat.BestRun(best.trial_id, best.last_result["objective"], best.config, analysis)


def report_to_ray(trainer: Any, metrics: dict[str, float]) -> None:
    """Report an evaluation during a trial, in the trial's own process."""
    import ray.tune

    ray.tune.report({**metrics, "objective": trainer.objective})


def run_wandb(
    trainer: Any,
    n_trials: int,
    direction: str | list[str],
    *,
    sweep_id: str | None = None,
    project: str | None = None,
    entity: str | None = None,
    name: str | None = None,
    metric: str = "eval/loss",
) -> Any:
    """Run a sweep of W&B, a new one or that of ``sweep_id``; a collective of all ranks.

    Raises:
        ConfigError: several objectives.
        TrainingError: no trial came to its end.
    """
    if not isinstance(direction, str):
        raise ConfigError(
            Problem(f"direction={direction!r}", "a sweep of W&B has one objective", "use optuna")
        )
    tracker = INTEGRATION_TO_CALLBACK["wandb"]
    if not any(isinstance(c, tracker) for c in trainer.callback_handler.callbacks):
        trainer.add_callback(tracker_callbacks(["wandb"])[0])
    if not trainer.ranks.is_main:
        return follow(trainer, lambda order: order)
    try:
        best = _lead_sweep(
            trainer, n_trials, direction, sweep_id, project, entity, name=name, metric=metric
        )
    except Exception as error:
        tell(Ended(failure=f"{type(error).__name__}: {error}"))
        raise
    tell(Ended(best))
    return best


def _lead_sweep(
    trainer: Any,
    n_trials: int,
    direction: str,
    sweep_id: str | None,
    project: str | None,
    entity: str | None,
    *,
    name: str | None,
    metric: str,
) -> Any:
    import wandb

    results: list[Any] = []
    failures: list[str] = []

    def objective() -> None:
        run = wandb.run or wandb.init()
        values = dict(run.config)
        tell((values, run.id))
        try:
            value = run_trial(trainer, values, run.id)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
            raise
        results.append(compat.BestRun(run.id, value, values))

    if sweep_id is None:
        config = dict(trainer.hp_space(None))
        config["metric"] = {**config.get("metric", {}), "goal": direction, "name": metric}
        if name is not None:
            config["name"] = name
        sweep_id = wandb.sweep(config, project=project, entity=entity)
    logger.warning("W&B sweep %s", sweep_id)
    wandb.agent(sweep_id, function=objective, count=n_trials, project=project, entity=entity)
    if not results:
        raise TrainingError(Problem("no trial of the sweep came to its end", "\n".join(failures)))
    choose = min if direction == "minimize" else max
    return choose(results, key=lambda run: run.objective)._replace(run_summary=sweep_id)


def _check_ray(trainer: Any, direction: Any, scheduler: Any) -> None:
    name = type(scheduler).__name__
    if trainer.ranks.world_size > 1:
        raise ConfigError(
            Problem(
                f"backend='ray' on {trainer.ranks.world_size} ranks",
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
    if name in _NEED_REPORTS and trainer.args.eval_strategy == "no":
        raise ConfigError(
            Problem(
                f"scheduler={name} with eval_strategy='no'",
                "it compares trials by their evaluations during training",
                "set eval_strategy to steps or epoch",
            )
        )
