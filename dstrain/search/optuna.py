"""Search with optuna: its study lives on the main rank, and every rank sees the same trial."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable
from typing import Any

import optuna

from dstrain.core.errors import ConfigError, Problem
from dstrain.core.ranks import Ranks, from_main
from dstrain.search import compat
from dstrain.search.trials import Ended, SearchStopped, Trials, follow, tell


def run(
    trials: Trials,
    n_trials: int,
    direction: str | list[str],
    *,
    timeout: float | None = None,
    n_jobs: int = 1,
    gc_after_trial: bool = False,
    catch: Any = (),
    **study_kwargs: Any,
) -> Any:
    """Run a study of ``n_trials``; a collective of all ranks.

    Raises:
        ConfigError: several trials at once.
        Exception: what a trial raised, unless ``catch`` names it.
    """
    if n_jobs != 1:
        raise ConfigError(
            Problem(
                f"n_jobs={n_jobs}",
                "the ranks train one model together, so one trial runs at a time",
                "leave n_jobs out; several searches can share a study in one storage",
            )
        )
    ranks = trials.ranks
    several: Any = list(direction) if isinstance(direction, (list, tuple)) else None
    prunes = several is None or len(several) == 1  # optuna prunes by one objective only
    if not ranks.is_main:
        return follow(
            trials, lambda number: (AgreedTrial(ranks, None, number, prunes=prunes), str(number))
        )

    def objective(trial: optuna.Trial) -> Any:
        tell(trial.number)
        agreed = AgreedTrial(ranks, trial, trial.number, prunes=prunes)
        try:
            value = trials.run(agreed, str(trial.number))
        except SearchStopped:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            raise
        if trials.is_over():
            study.stop()
        return value

    try:
        study = optuna.create_study(
            direction=None if several else str(direction),  # type: ignore[arg-type]
            directions=several,
            **study_kwargs,
        )
        with contextlib.suppress(SearchStopped):
            study.optimize(
                objective,
                n_trials=n_trials,
                timeout=timeout,
                gc_after_trial=gc_after_trial,
                catch=catch,
            )
        if trials.is_over() and not _has_complete(study):
            best: Any = None if several is None else []
        elif several is None:
            best = _best_run(study.best_trial, study.best_trial.value)
        else:
            best = [_best_run(trial, trial.values) for trial in study.best_trials]
    except Exception as error:
        tell(Ended(failure=f"{type(error).__name__}: {error}"))
        raise
    tell(Ended(best))
    return best


def prune_if_told(trial: Any, objective: Any, *, step: int, on_prune: Callable[[], object]) -> None:
    """Report the objective of an evaluation, and end the trial on all ranks if the pruner says so.

    Args:
        trial: of this search; one that cannot be reported to is left alone.
        objective: that the evaluation gave.
        step: that training has come to.
        on_prune: called before the trial ends.

    Raises:
        optuna.TrialPruned: on every rank.
    """
    if not getattr(trial, "prunes", True) or not hasattr(trial, "report"):
        return
    trial.report(objective, step)
    if trial.should_prune():
        on_prune()
        raise optuna.TrialPruned


class AgreedTrial(optuna.trial.BaseTrial):
    """Is a trial on all ranks: the answers of the main rank's trial go to every rank.

    All ranks must ask the same in the same order, as ``hp_space`` and ``model_init`` do.
    """

    def __init__(
        self, ranks: Ranks, trial: optuna.Trial | None, number: int, *, prunes: bool = True
    ) -> None:
        """Begin without any value.

        Args:
            ranks: facts of this process.
            trial: the study's own, on the main rank; None elsewhere.
            number: its place among the trials of the study.
            prunes: whether the search may end the trial early.
        """
        self._ranks, self._trial, self._number = ranks, trial, number
        self.prunes = prunes
        self._params: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the study's own trial, which is on the main rank."""
        trial = self.__dict__.get("_trial")
        if trial is None:
            raise AttributeError(f"{name}: the study and its trial are on rank 0")
        return getattr(trial, name)

    def _suggest(self, method: str, name: str, *args: Any, **kwargs: Any) -> Any:
        value = self._agree(lambda trial: getattr(trial, method)(name, *args, **kwargs))
        self._params[name] = value
        return value

    def _agree(self, ask: Callable[[Any], Any]) -> Any:
        return from_main(self._ranks, lambda: ask(self._trial))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Suggest a number in [low, high], on a logarithmic scale or in steps."""
        return self._suggest("suggest_float", name, low, high, step=step, log=log)

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        """Suggest a whole number in [low, high]."""
        return self._suggest("suggest_int", name, low, high, step=step, log=log)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """Suggest one of ``choices``."""
        return self._suggest("suggest_categorical", name, choices)

    def suggest_uniform(self, name: str, low: float, high: float) -> float:
        """Call ``suggest_float``, whose old name this is."""
        return self.suggest_float(name, low, high)

    def suggest_loguniform(self, name: str, low: float, high: float) -> float:
        """Call ``suggest_float`` with ``log=True``, whose old name this is."""
        return self.suggest_float(name, low, high, log=True)

    def suggest_discrete_uniform(self, name: str, low: float, high: float, q: float) -> float:
        """Call ``suggest_float`` with ``step``, whose old name this is."""
        return self.suggest_float(name, low, high, step=q)

    def report(self, value: float, step: int) -> None:
        """Tell the study of an objective on the way."""
        self._agree(lambda trial: trial.report(value, step))

    def should_prune(self) -> bool:
        """Tell whether the study's pruner gives this trial up."""
        return self._agree(lambda trial: bool(trial.should_prune()))

    def set_user_attr(self, key: str, value: Any) -> None:
        """Keep a value with the trial in the study."""
        if self._trial is not None:
            self._trial.set_user_attr(key, value)

    def set_constraint(self, key: str, value: float) -> None:
        """Keep a constraint's value with the trial in the study."""
        if self._trial is not None:
            self._trial.set_constraint(key, value)

    @property
    def params(self) -> dict[str, Any]:
        """Return every value suggested so far."""
        return dict(self._params)

    @property
    def number(self) -> int:
        """Return its place among the trials of the study."""
        return self._number

    @property
    def distributions(self) -> dict[str, Any]:
        """Return the distributions of the values, from the main rank's trial."""
        return self._agree(lambda trial: trial.distributions)

    @property
    def user_attrs(self) -> dict[str, Any]:
        """Return what ``set_user_attr`` has kept, from the main rank's trial."""
        return self._agree(lambda trial: trial.user_attrs)

    @property
    def constraints(self) -> dict[str, float]:
        """Return what ``set_constraint`` has kept, from the main rank's trial."""
        return self._agree(lambda trial: trial.constraints)

    @property
    def datetime_start(self) -> datetime.datetime | None:
        """Return when the trial began, from the main rank's trial."""
        return self._agree(lambda trial: trial.datetime_start)


def _has_complete(study: optuna.Study) -> bool:
    """Tell whether a trial of the study has its objective."""
    return bool(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)))


def _best_run(trial: Any, objective: Any) -> Any:
    return compat.BestRun(str(trial.number), objective, trial.params)
