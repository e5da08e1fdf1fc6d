"""Methods of a ``Trainer`` that search hyperparameters: one training per trial, on all ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dstrain.arguments import TrainingArguments
from dstrain.core.errors import ConfigError, Problem, TrainingError
from dstrain.core.log import get_logger
from dstrain.core.ranks import all_or_none, from_main
from dstrain.models import check_writable
from dstrain.trainer import build
from dstrain.trainer.signal_hooks import SignalHooks
from dstrain.training.preemption import Preemption
from dstrain.training.types import PlainState, Trial

logger = get_logger(__name__)


class SearchHooks(SignalHooks):
    """Has the methods of transformers' Trainer about a search.

    Attributes:
        hp_space: the search's trial -> hyperparameters.
        hp_name: the search's trial -> name of the trial, or None.
        compute_objective: the search's metrics -> value to optimise.
        objective: the present trial's value, once one of its evaluations is over.
    """

    hp_space: Callable[[Trial], Any] | None = None
    hp_name: Callable[[Trial], str] | None = None
    compute_objective: Callable[[dict[str, float]], Any] | None = None
    objective: Any = None
    _trial: Trial = None
    _trial_id: str = ""
    _args_outside: TrainingArguments | None = None
    _restore_callbacks: Callable[[], None] | None = None

    def hyperparameter_search(
        self,
        hp_space: Callable[[Trial], Any] | None = None,
        compute_objective: Callable[[dict[str, float]], Any] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        backend: object = None,
        hp_name: Callable[[Trial], str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Train with different arguments and find the best; all ranks must call it.

        Each trial starts from ``args`` as they are, with its hyperparameters in place of theirs,
        and writes into a folder of its own, ``output_dir/run-<number>`` or what ``hp_name`` says.
        In each, and after the search, early stopping and other callbacks whose state a checkpoint
        would hold begin as they were before.
        The main rank asks the backend; what it decides holds on all ranks.
        A signal to any rank (see ``preemption``), in a trial or between two, ends the search on all
        of them: the trial that it cut has no result (a failed trial of optuna's study), and no
        other begins. With ray a trial's own process is sent the signal, and only that trial fails.

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
            the best trade-offs for several objectives. After a signal, with
            ``preemption="return"``, the best of the trials that were complete, or None where none
            was; ``trainer.preempted`` tells.

        Raises:
            ConfigError: no ``model_init``, or a backend that is not installed or cannot do this.
            Preempted: a signal ended the search, with ``preemption="exit"``.
        """
        from dstrain.search import trials

        name = trials.backend_named(backend)
        if self.model_init is None:
            raise ConfigError(
                Problem(
                    "hyperparameter_search without model_init",
                    "every trial starts from a new model",
                    "pass model_init to the Trainer instead of model",
                )
            )
        self.hp_search_backend, self.hp_name = name, hp_name
        self.hp_space = hp_space or trials.default_space(name)
        self.compute_objective = compute_objective or trials.default_objective
        self._restore_callbacks = self.events.record_states()
        # The main process of ray trains nothing, and ray handles its signals.
        watches = self.args.preemption != "ignore" and name != "ray"
        watch = Preemption(self.ranks, watches=watches)
        self._trials_done, self._has_saved_for_signal = 0, False
        with watch.watching(asks=False):
            self._search_watch = watch
            try:
                best = self._search(name, n_trials, direction, **kwargs)
            finally:
                self._search_watch = self.hp_search_backend = None
                self._take_up_trial(None)
                self._restore_callbacks()
            end = self._end_search(watch)
        if end is not None:
            raise end
        return best

    def _search(
        self, backend: str, n_trials: int, direction: str | list[str], **kwargs: Any
    ) -> Any:
        """Let the backend run its trials."""
        from dstrain.search.trials import Trials

        assert self.hp_space is not None
        trials = Trials(self.ranks, self._run_trial, self.hp_space, self._search_is_over)
        if backend == "optuna":
            from dstrain.search import optuna

            return optuna.run(trials, n_trials, direction, **kwargs)
        if backend == "wandb":
            from dstrain.search import wandb

            wandb.check(direction)
            self._report_to_wandb()
            return wandb.run(trials, n_trials, str(direction), **kwargs)
        from dstrain.search import ray

        ray.check(
            world_size=self.ranks.world_size,
            direction=direction,
            scheduler=kwargs.get("scheduler"),
            evaluates=self.args.eval_strategy != "no",
        )
        scope = self.args.ray_scope
        with self._without_model():
            return ray.run(
                self._run_ray_trial,
                self.hp_space(None),
                n_trials,
                str(direction),
                scope=scope,
                **kwargs,
            )

    def _run_trial(self, trial: object, trial_id: str) -> Any:
        """Train and evaluate with a trial, and return its objective; a collective of all ranks.

        Raises:
            SearchStopped: a signal ended it, on all ranks.
        """
        assert self._restore_callbacks is not None
        self._begin_trial()
        self._trial_id, self.objective = trial_id, None
        self._restore_callbacks()
        try:
            self.train(trial=trial)
            self._check_not_cut()
            if self.objective is None:  # no evaluation during training
                self.objective = self._objective_of(self._evaluate_trial())
            self._end_trial()
            return self.objective
        finally:
            self.close()
            self._leave_trial()

    def _run_ray_trial(self, config: Mapping[str, object], trial_id: str) -> PlainState | None:
        """Train with a trial of ray, in the process that ray has started for it.

        Returns:
            the metrics of an evaluation after training; None where training has evaluated, and
            reported that itself.

        Raises:
            TrainingError: a signal to this process ended the trial.
        """
        build.start_run(self.args)
        self._trial_id, self.objective = trial_id, None
        self.train(trial=config)
        if self.preempted:
            raise TrainingError(
                Problem(f"a signal ended trial {trial_id}", "it has no result that could count")
            )
        if self.objective is not None:
            return None
        metrics = self.evaluate()
        self.objective = self._objective_of(metrics)
        return {**metrics, "objective": self.objective}

    @contextlib.contextmanager
    def _without_model(self) -> Iterator[None]:
        """Let go, in the block, of what cannot be pickled and is made anew by each trial."""
        from dstrain.reporting.compat import INTEGRATION_TO_CALLBACK
        from dstrain.search.trials import with_values

        self.close()
        outside = self.args
        # A trial's process has a working folder of its own.
        self.args = with_values(outside, {"output_dir": os.path.abspath(outside.output_dir)})
        board = self.pop_callback(INTEGRATION_TO_CALLBACK["tensorboard"])
        self.model = None  # type: ignore[assignment]
        self._show_objects(None)
        try:
            yield
        finally:
            self.args = outside
            self._renew_model(None)
            if board is not None:
                self.add_callback(board)

    def _report_to_wandb(self) -> None:
        """Add W&B to the trackers where it is missing: a sweep reads its records."""
        from dstrain.reporting import tracker_callbacks
        from dstrain.reporting.compat import INTEGRATION_TO_CALLBACK

        tracker = INTEGRATION_TO_CALLBACK["wandb"]
        if not any(isinstance(c, tracker) for c in self.callback_handler.callbacks):
            self.add_callback(tracker_callbacks(["wandb"])[0])

    def _take_up_trial(self, trial: object) -> None:
        """Put a trial's arguments in place, or those from before it."""
        self._leave_trial()
        self._trial = trial
        searching = self.hp_search_backend is not None and trial is not None
        self.state.is_hyper_param_search = searching
        self.state.trial_name = self.state.trial_params = None
        values = self._hyperparameters(trial)
        if not searching and not values:
            return
        from dstrain.search.trials import plain_values, with_values

        self._args_outside = self.args
        if searching:
            name = f"run-{self._trial_id}" if self.hp_name is None else self.hp_name(trial)
            values = {"output_dir": str(Path(self.args.output_dir) / name), **values}
            self.state.trial_name = name
            self.state.log_history = []
        self.args = with_values(self.args, values)
        self.state.trial_params = plain_values(values)
        with all_or_none():
            if self.ranks.is_main:
                check_writable(self.args.output_dir)
                logger.warning("trial %s: %s", self._trial_id, self.state.trial_params)

    def _leave_trial(self) -> None:
        """Put the arguments from before a trial back."""
        if self._args_outside is not None:
            self.args, self._args_outside = self._args_outside, None

    def _hyperparameters(self, trial: object) -> PlainState:
        if isinstance(trial, dict):
            from dstrain.search.trials import hyperparameters_of

            return hyperparameters_of(trial)
        if trial is None or self.hp_search_backend is None or self.hp_space is None:
            return {}
        return dict(self.hp_space(trial))

    def _report_trial(self, metrics: dict[str, float]) -> None:
        """Tell the backend of an evaluation during a trial; all ranks stop where it says so."""
        if self.hp_search_backend is None or self._trial is None:
            return
        self.objective = self._objective_of(metrics)
        if self.hp_search_backend == "optuna":
            from dstrain.search.optuna import prune_if_told

            prune_if_told(
                self._trial,
                self.objective,
                step=self.state.global_step,
                on_prune=lambda: self.event("on_train_end"),
            )
        elif self.hp_search_backend == "ray":
            from dstrain.search import ray

            ray.report(metrics, self.objective)

    def _objective_of(self, metrics: dict[str, float]) -> Any:
        assert self.compute_objective is not None
        compute = self.compute_objective
        return from_main(self.ranks, lambda: compute(dict(metrics)))
