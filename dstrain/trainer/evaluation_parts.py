"""Steps of a ``Trainer``'s evaluation that subclasses do not override."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dstrain.core.errors import ConfigError, Problem
from dstrain.core.log import get_logger
from dstrain.data import LossTargets, returns_loss, synchronized_batches
from dstrain.engine import device_name
from dstrain.evaluation import (
    BatchMetric,
    Collector,
    EvalBatch,
    Prediction,
    PredictionOptions,
    Transport,
)
from dstrain.trainer.eval_format import full_eval_format, in_format
from dstrain.trainer.model_hooks import ModelHooks
from dstrain.trainer.report_hooks import ReportHooks

logger = get_logger(__name__)

PREDICTION = "Prediction"
_MEGABYTE = 2**20
_MOST_WATCHED = 8  # forward passes of an evaluation, where the first have no loss or no target


class EvaluationParts(ModelHooks, ReportHooks):
    """Has the private methods on which ``EvaluationHooks`` is built."""

    _eval_targets: tuple[LossTargets, LossTargets] | None = None  # of training, and made from them
    _num_watched: int = 0

    @property
    def label_names(self) -> list[str]:
        """Return the batch keys that are labels, from ``label_names`` or the model's signature."""
        return list(self.targets.labels)

    def _undo_of_evaluation(self) -> Callable[[], None]:
        """Return a function that undoes an evaluation's log entries and effects on callbacks.

        It restores what a checkpoint holds: a run that resumes there evaluates all sets again.
        Trackers have been told nothing yet.
        """
        num_entries = len(self.state.log_history)
        restore_states = self.events.record_states()

        def undo() -> None:
            del self.state.log_history[num_entries:]
            restore_states()

        return undo

    @contextlib.contextmanager
    def _targets_of_evaluation(self) -> Iterator[None]:
        """Count targets, in the block, by what the losses of evaluation are means over."""
        training = self.targets
        if self._eval_targets is None or self._eval_targets[0] is not training:
            self._eval_targets = training, training.for_evaluation()
        self.targets = self._eval_targets[1]
        try:
            yield
        finally:
            self.targets = training

    def _watching(self, inputs: object) -> contextlib.AbstractContextManager[list[Any]]:
        """Watch an evaluation's first forward passes for what its loss is a mean over."""
        watches = self._num_watched < _MOST_WATCHED or self.targets.settled
        return self.targets.watching(inputs) if watches else contextlib.nullcontext([])

    def _meet(self, collector: Collector | None) -> None:
        """Agree with the other ranks after a batch: on what a target is, and on signals."""
        self._num_watched += 1
        if not self.targets.settled and self._num_watched <= _MOST_WATCHED:
            self.targets.agree(self.ranks, final=False)
        elif self._num_watched % _MOST_WATCHED == 0:
            self._settle_rivals()
        self._heed_signals(collector)

    def _settle_rivals(self) -> None:
        """Agree on what a target is, where later batches have shown it; a collective."""
        if self.targets.has_rivals:
            self.targets.agree(self.ranks, final=False)

    def _can_count(self) -> bool:
        """Tell whether batches can be counted now; until ranks agree they are held."""
        is_given_up = not self.targets.settled and self._num_watched >= _MOST_WATCHED
        return self.targets.can_count or is_given_up

    def _heed_signals(self, collector: Collector | None) -> None:
        """End the evaluation where a signal ends the training around it."""
        if self._preemption is not None:
            self._preemption.heed(may_ask=collector is None or collector.has_sent_all)

    def _check_evaluation(self) -> None:
        """Refuse what could only fail in the first evaluation.

        Raises:
            ConfigError: metrics of batches without the argument that they need, or a format of
                evaluation that cannot be had.
        """
        full_eval_format(self.args, self.resolved)
        if self.compute_metrics is None or not self.args.batch_eval_metrics:
            return
        import inspect

        if "compute_result" not in inspect.signature(self.compute_metrics).parameters:
            raise ConfigError(
                Problem(
                    "batch_eval_metrics=True with a compute_metrics that takes no compute_result",
                    "it is called with each batch, and compute_result=True with the last",
                    "add the argument compute_result, and return the metrics when it is true",
                )
            )

    @contextlib.contextmanager
    def _model_for_evaluation(self, *, generates: bool) -> Iterator[torch.nn.Module]:
        """Yield the engine or module that runs the forward passes of one evaluation."""
        if self._engines.training is not None:
            self._engines.training.buffers.find_changed()
        model = self._engines.forward_model(self.model, self.resolved)
        # While training runs the engine's format is used, as in transformers.
        wanted = None if self.is_in_train else full_eval_format(self.args, self.resolved)
        with self._engines.passes(self.model):
            if wanted is None:
                yield model
                return
            self._eval_format = wanted
            try:
                with in_format(self.model, wanted):
                    yield self.model
            finally:
                self._eval_format = None

    def _batch_metric(self) -> BatchMetric | None:
        if self.compute_metrics is None or not self.args.batch_eval_metrics:
            return None
        return BatchMetric(self.compute_metrics)

    def _collector(
        self, transport: Transport, batch_metric: BatchMetric | None, description: str
    ) -> Collector:
        keeping = PredictionOptions(
            folder=Path(self.args.output_dir),
            keep=batch_metric is None or description == PREDICTION,
            concat=self.args.eval_do_concat_batches,
            every=self.args.eval_accumulation_steps or 1,
            losses="loss" in self.args.include_for_metrics,
            objects=bool(self.args.eval_use_gather_object),
            memory_bytes=self.args.eval_memory_mb * _MEGABYTE,
        )
        return Collector(
            transport, keeping, on_batch=None if batch_metric is None else batch_metric.add
        )

    def _reduced(self, prediction: Prediction) -> Prediction:
        """Apply ``preprocess_logits_for_metrics`` to the logits, where both are there."""
        reduce, logits = self.preprocess_logits_for_metrics, prediction.predictions
        if logits is None or reduce is None:
            return prediction
        return replace(prediction, predictions=reduce(logits, prediction.labels))

    def _eval_batches(self, loader: object) -> Iterator[EvalBatch]:
        """Yield this rank's batches; note for the other ranks which one it is in."""
        batches = synchronized_batches(loader, device=device_name())
        # Metrics of batches are computed on one rank, which may take as long as it takes.
        meets = self.compute_metrics is None or not self.args.batch_eval_metrics
        for number, (micro_batch, is_last) in enumerate(batches, 1):
            self._watches.enter(f"batch {number} of an evaluation", in_step=meets, may_lag=True)
            yield EvalBatch(micro_batch.inputs, micro_batch.num_samples, is_last)

    def _computes_loss(self, inputs: Mapping[str, object]) -> bool:
        """Tell whether there is a loss although the batch has no labels."""
        if self.compute_loss_func is not None or self._overrides("compute_loss"):
            return True
        wanted = inputs.get("return_loss")
        return returns_loss(self.model) if wanted is None else bool(wanted)

    def _ignored_keys(self) -> Sequence[str]:
        """Return the names of outputs that, by the model's config, are no predictions."""
        config = getattr(self.model, "config", None)
        if config is None:
            return ()
        return getattr(config, "keys_to_ignore_at_inference", ("past_key_values",))
