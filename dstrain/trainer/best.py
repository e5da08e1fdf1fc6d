"""Keeping track of a run's best model, and loading it when training has ended."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dstrain.arguments import TrainingArguments
from dstrain.checkpoint import (
    holding,
    load_weights,
    read_arguments,
    read_manifest,
    step_of,
    verify_on_ranks,
)
from dstrain.core.adapters import has_adapters
from dstrain.core.errors import CheckpointError, ConfigError, Problem
from dstrain.core.log import get_logger
from dstrain.core.ranks import Ranks, broadcast_object, from_main
from dstrain.evaluation import BestRule
from dstrain.models import weights_not_in_files

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from transformers import TrainerState

    from dstrain.checkpoint import TrainerStateRecord
    from dstrain.engine import Engine

logger = get_logger(__name__)


class BestModel:
    """Keeps the ``best_*`` fields of ``TrainerState``; without a metric it does nothing.

    ``best_metric`` and ``best_global_step`` are of the best evaluation. ``best_model_checkpoint``
    is the best of the checkpoints that were saved, which need not be of that step where evaluations
    are more frequent than checkpoints.
    """

    def __init__(
        self,
        args: TrainingArguments,
        state: TrainerState,
        ranks: Ranks,
        model: torch.nn.Module,
    ) -> None:
        """Begin a run that has not evaluated yet.

        Args:
            args: the user's arguments.
            state: the trainer's state, whose ``best_*`` fields are kept up to date.
            ranks: rank and world size of this process.
            model: the model that is trained.

        Raises:
            ConfigError: the best model could not be loaded from the checkpoints of this run.
        """
        self._args, self._state, self._ranks = args, state, ranks
        self.rule = None
        if args.metric_for_best_model is not None:
            self.rule = BestRule(args.metric_for_best_model, bool(args.greater_is_better))
        self._latest: tuple[int, float] | None = None
        self._saved: dict[int, float] = {}
        self._folders: dict[int, Path] = {}
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        if args.load_best_model_at_end:
            _check_loadable(args)
            _check_files_suffice(args, model)

    def judge(self, metrics: Mapping[str, object]) -> bool:
        """Note an evaluation, and tell whether it is the best so far; a collective of all ranks.

        Raises:
            ConfigError: it does not have the metric.
        """
        if self.rule is None:
            return False
        # The main rank decides: ranks that disagreed would not meet in the save that follows.
        value, known = broadcast_object((metrics.get(self.rule.key), list(metrics)))
        if value is None:
            raise self.rule.missing(known)
        state, value = self._state, self.rule.number(value)
        self._latest = state.global_step, value
        if not self.rule.is_better(value, state.best_metric):
            return False
        state.best_metric = value
        if self._args.save_strategy != "no":
            state.best_global_step = state.global_step
        return True

    def note_save(self, folder: Path, *, failed: Collection[int]) -> None:
        """Note that ``folder`` is about to be written at this step.

        Args:
            folder: the checkpoint.
            failed: steps of earlier checkpoints that could not be written after all.
        """
        if self._latest is not None and self._latest[0] == self._state.global_step:
            step, value = self._latest
            self._saved[step], self._folders[step] = value, folder
        self.forget(set(failed) - {self._state.global_step})

    def forget(self, failed: Collection[int]) -> None:
        """Choose the best checkpoint without those that could not be written."""
        if self.rule is None:
            return
        there = {step: value for step, value in self._saved.items() if step not in failed}
        best = self.rule.best_of(there)
        folder = None if best is None else str(self._folders[best])
        self._state.best_model_checkpoint = folder

    def take_up(self, saved: TrainerStateRecord, start: Path) -> None:
        """Go on from the state in a checkpoint.

        Args:
            saved: the ``TrainerState`` in the checkpoint.
            start: the checkpoint; a run whose folders were moved has its best one beside it.
        """
        if self.rule is None or saved.best_metric is None:
            return
        if self._rule_of(start) != self.rule:
            self._warn("best_metric starts anew: the saved run chose its best model by another one")
            return
        state = self._state
        state.best_metric = saved.best_metric
        state.best_global_step = saved.best_global_step
        if saved.best_model_checkpoint is None:
            return
        named = Path(saved.best_model_checkpoint)
        for folder in (named, start.parent / named.name):
            step = step_of(folder.name)
            if step is not None and (value := self._value_in(folder)) is not None:
                self._saved[step], self._folders[step] = value, folder
                state.best_model_checkpoint = str(folder)
                return
        self._warn(f"the best checkpoint of the saved run, {named}, is not there any more")

    def load(self, engine: Engine, *, failed: Collection[int]) -> None:
        """Load the weights of the best checkpoint into the engine; a collective of all ranks.

        Nothing else changes: optimizer, schedule and counters stay those of the last step.

        Raises:
            CheckpointError: it does not verify.
        """
        self.forget(failed)
        state = self._state
        if state.best_model_checkpoint is None:
            self._warn(
                "load_best_model_at_end: no checkpoint has an evaluation, so the weights stay "
                "those of the last step"
            )
            return
        folder, ranks = Path(state.best_model_checkpoint), self._ranks
        whole = verify_on_ranks(folder, ranks, on_each_node=self._args.save_on_each_node)
        with holding(folder):
            load_weights(engine, folder, whole, ranks)
        if ranks.is_main:
            logger.info("loaded the best model: %s, %s", folder, state.best_metric)

    def _value_in(self, folder: Path) -> float | None:
        """Read the metric in a checkpoint's manifest (None if it has none) for all ranks."""
        assert self.rule is not None
        value = None
        if self._ranks.is_main:
            try:
                value = read_manifest(folder).figure(self.rule.key)
            except CheckpointError:
                value = None
        return broadcast_object(value)

    def _rule_of(self, start: Path) -> BestRule | None:
        """Return how the saved run chose its best model; this run's rule where it does not say."""
        saved = from_main(self._ranks, lambda: read_arguments(start))
        if saved is None:
            return self.rule
        metric = saved.metric_for_best_model
        return None if metric is None else BestRule(metric, bool(saved.greater_is_better))

    def _warn(self, message: str) -> None:
        if self._ranks.is_main:
            logger.warning("%s", message)


def _check_loadable(args: TrainingArguments) -> None:
    """Check that checkpoints in DeepSpeed's layout, which have no slices, have model files.

    Raises:
        ConfigError: they have none.
    """
    if args.checkpoint_format != "deepspeed" or args.save_weights_with_checkpoint:
        return
    raise ConfigError(
        Problem(
            "load_best_model_at_end=True with checkpoint_format='deepspeed'",
            "the best weights would have to come back from the checkpoints' model files; "
            "save_weights_with_checkpoint=False leaves the model out of them",
            "leave checkpoint_format out",
        )
    )


def _check_files_suffice(args: TrainingArguments, model: torch.nn.Module) -> None:
    """Check that model files hold the weights unchanged, where only they can bring them back.

    Raises:
        ConfigError: hooks of the model save weights in another form, or not at all.
    """
    if not args.save_only_model and args.checkpoint_format != "deepspeed":
        return
    if has_adapters(model) or not (names := weights_not_in_files(model)):
        return
    raise ConfigError(
        Problem(
            f"load_best_model_at_end=True, and the best weights would come from model files alone, "
            f"which have {', '.join(names[:3])} not as the model has it",
            "hooks of the model's state_dict save it in another form, or not at all",
            "leave save_only_model and checkpoint_format out: then weights are in slices, as they "
            "are",
        )
    )
