"""Search with sweeps of W&B: the main rank runs its agent, and the other ranks follow."""

from __future__ import annotations

import contextlib
import os
from typing import Any, NoReturn

from dstrain.core.errors import ConfigError, Problem, TrainingError
from dstrain.core.log import get_logger
from dstrain.search import compat
from dstrain.search.trials import Ended, SearchStopped, Trials, follow, tell

logger = get_logger(__name__)

# With "true" the agent of W&B, which has no other way to be ended, ends at a run that fails.
_ENDS_AT_FAILURE = "WANDB_AGENT_DISABLE_FLAPPING"


class _AgentEnded(Exception):
    """Raised in a run of the agent to end it with this run, as a signal has ended the search."""


def check(direction: object) -> None:
    """Refuse a search that a sweep cannot run.

    Raises:
        ConfigError: several objectives.
    """
    if not isinstance(direction, str):
        raise ConfigError(
            Problem(f"direction={direction!r}", "a sweep of W&B has one objective", "use optuna")
        )


def run(
    trials: Trials,
    n_trials: int,
    direction: str,
    *,
    sweep_id: str | None = None,
    project: str | None = None,
    entity: str | None = None,
    name: str | None = None,
    metric: str = "eval/loss",
) -> Any:
    """Run a sweep of W&B, a new one or that of ``sweep_id``; a collective of all ranks.

    Raises:
        TrainingError: no trial came to its end.
    """
    import wandb

    if not trials.ranks.is_main:
        return follow(trials, lambda order: order)
    try:
        if sweep_id is None:
            config = dict(trials.space(None))
            config["metric"] = {**config.get("metric", {}), "goal": direction, "name": metric}
            if name is not None:
                config["name"] = name
            sweep_id = wandb.sweep(config, project=project, entity=entity)
        results = _run_agent(trials, n_trials, sweep_id, project=project, entity=entity)
        best_of = min if direction == "minimize" else max
        best = None
        if results:
            best = best_of(results, key=lambda run: run.objective)._replace(run_summary=sweep_id)
    except Exception as error:
        tell(Ended(failure=f"{type(error).__name__}: {error}"))
        raise
    tell(Ended(best))
    return best


def _run_agent(
    trials: Trials, n_trials: int, sweep_id: str, *, project: str | None, entity: str | None
) -> list[Any]:
    """Run the trials that the sweep gives; return a ``BestRun`` of each that came to its end.

    Raises:
        TrainingError: none did, and no signal ended the search.
    """
    import wandb

    results: list[Any] = []
    failures: list[str] = []

    def objective() -> None:
        if trials.is_over():
            _end_agent("a signal has ended the search")
        run = wandb.run or wandb.init()
        values = dict(run.config)
        tell((values, run.id))
        try:
            value = trials.run(values, run.id)
        except SearchStopped as stop:
            _end_agent(str(stop))
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
            raise
        results.append(compat.BestRun(run.id, value, values))

    logger.warning("W&B sweep %s", sweep_id)
    before = os.environ.get(_ENDS_AT_FAILURE)
    try:
        with contextlib.suppress(_AgentEnded):
            wandb.agent(
                sweep_id, function=objective, count=n_trials, project=project, entity=entity
            )
    finally:
        os.environ.pop(_ENDS_AT_FAILURE, None)
        if before is not None:
            os.environ[_ENDS_AT_FAILURE] = before
    if not results and not trials.is_over():
        raise TrainingError(Problem("no trial of the sweep came to its end", "\n".join(failures)))
    return results


def _end_agent(reason: str) -> NoReturn:
    """Fail the agent's present run, and let it begin no other.

    Raises:
        _AgentEnded: always.
    """
    os.environ[_ENDS_AT_FAILURE] = "true"
    raise _AgentEnded(reason) from None
