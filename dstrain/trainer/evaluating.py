"""Evaluation and prediction on a ``Trainer``: what a user calls, and what a subclass overrides."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dstrain.config.resolution.batch import eval_micro_batch
from dstrain.core.errors import ConfigError, DataError, Problem
from dstrain.core.log import get_logger
from dstrain.core.seeds import random_state, set_random_state
from dstrain.data import forward_columns, returns_loss, set_epoch, synchronized_batches, to_device
from dstrain.engine import device_name
from dstrain.evaluation import (
    BatchMetric,
    Collected,
    Collector,
    EvalBatch,
    Prediction,
    PredictionOptions,
    Transport,
    evaluate_batches,
    metric_values,
    with_prefix,
)
from dstrain.trainer import compat
from dstrain.trainer.eval_format import full_eval_format, in_format
from dstrain.trainer.eval_loaders import EvalLoaderHooks
from dstrain.training.key_value_cache import KeyValueCache
from dstrain.training.model_outputs import logits_of, loss_of
from dstrain.training.preemption import EvaluationStopped, Preemption
from dstrain.training.watches import RankWatches, watched

logger = get_logger(__name__)

_EVALUATION, _PREDICTION = "Evaluation", "Prediction"
_MEGABYTE = 2**20
_MOST_WATCHED = 8  # forward passes of an evaluation, where the first have no loss or no target


class EvaluationHooks(EvalLoaderHooks):
    """The methods of transformers' Trainer about evaluation and prediction.

    Every sample is predicted once, at any number of ranks. Predictions go to rank 0 alone, which
    computes metrics and tells the others; what is large there is in files.
    """

    args: Any
    state: Any
    control: Any
    best: Any
    model: Any
    compute_metrics: Any
    preprocess_logits_for_metrics: Any
    resolved: Any
    ranks: Any
    targets: Any
    _watches: RankWatches
    _eval_targets: tuple[Any, Any] | None = None  # those of training, and made from them
    events: Any
    is_in_train: bool
    ignore_keys_for_eval: list[str] | None = None
    _eval_format: str | None = None
    _engines: Any
    compute_loss: Any
    compute_loss_context_manager: Any
    log: Any
    _prepare_inputs: Any
    _parts_of: Any
    _num_watched: int = 0
    _summed: Any
    _computing_loss: Any
    _report_trial: Any
    _follow_metric: Any
    _memory: Any
    _preemption: Preemption | None = None  # of the training that runs, or ran last

    @property
    def label_names(self) -> list[str]:
        """Return the batch keys that are labels, from ``label_names`` or the model's signature."""
        return list(self.targets.labels)

    # --- what a user calls ----------------------------------------------------------------------

    @watched(_EVALUATION.lower())
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Compute loss and metrics over a dataset, each sample once; log them, on all ranks.

        Works before, during and after training at every ZeRO stage. The loss is the mean over all
        targets, so it depends neither on the batch size nor on the number of ranks.
        ``compute_metrics`` runs on rank 0 alone.

        Args:
            eval_dataset: instead of the one given to the constructor, or the name of one there; of
                a dict each set is evaluated, with its name in the prefix.
            ignore_keys: outputs of the model that are no predictions.
            metric_key_prefix: "eval" gives ``eval_loss`` and so on.

        Raises:
            DataError: no evaluation data, or an empty one.
            Exception: what ``compute_metrics`` raised, on all ranks.
        """
        parts = self._named_parts(eval_dataset)
        if parts is not None:
            results: dict[str, float] = {}
            for name, part in parts.items():
                results |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return results
        loader = self._agreed_loader(
            lambda: self.get_eval_dataloader(eval_dataset), method="get_eval_dataloader"
        )
        self._memory.start("eval")
        started = time.time()
        with KeyValueCache(
            self.model, used=self.args.use_cache
        ).as_asked():  # for loops of a subclass, too
            output = self.prediction_loop(
                loader,
                description=_EVALUATION,
                # Without metrics nobody would look at predictions.
                prediction_loss_only=True if self.compute_metrics is None else None,
                ignore_keys=ignore_keys,
                metric_key_prefix=metric_key_prefix,
            )
        metrics = self._with_speed(output, started, metric_key_prefix)
        self.log(metrics)
        self.events("on_evaluate", metrics=metrics)
        metrics |= self._memory.stop("eval")
        return metrics

    @watched(_PREDICTION.lower())
    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> Any:
        """Predict a dataset, in its order; compute metrics where it has labels. Logs nothing.

        Args:
            test_dataset: the data.
            ignore_keys: outputs of the model that are no predictions.
            metric_key_prefix: "test" gives ``test_loss`` and so on.

        Returns:
            ``PredictionOutput(predictions, label_ids, metrics)``. Rank 0 has the predictions as
            numpy arrays; beyond ``eval_memory_mb`` these are memory maps of files that vanish with
            them. Shorter rows are padded with -100. Other ranks have arrays of the same kind
            without rows, and the same metrics.
        """
        loader = self._agreed_loader(
            lambda: self.get_test_dataloader(test_dataset), method="get_test_dataloader"
        )
        self._memory.start("test")
        started = time.time()
        with KeyValueCache(self.model, used=self.args.use_cache).as_asked():
            output = self.prediction_loop(
                loader,
                description=_PREDICTION,
                ignore_keys=ignore_keys,
                metric_key_prefix=metric_key_prefix,
            )
        metrics = self._with_speed(output, started, metric_key_prefix)
        self.events("on_predict", metrics=metrics)
        metrics |= self._memory.stop("test")
        return compat.PredictionOutput(output.predictions, output.label_ids, metrics)

    # --- what a subclass overrides --------------------------------------------------------------

    def derived_metrics(self, metrics: dict[str, float], prefix: str) -> dict[str, float]:
        """Compute metrics from others after an evaluation; none by default."""
        return {}

    def prediction_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Run ``evaluation_loop`` under its older name; ``evaluate`` and ``predict`` call this."""
        return self.evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Run a loader through ``prediction_step``; with and without labels.

        Args:
            dataloader: this rank's.
            description: "Evaluation" or "Prediction", which keeps predictions in any case.
            prediction_loss_only: no predictions; None does what the argument of that name says.
            ignore_keys: outputs of the model that are no predictions.
            metric_key_prefix: before the names of metrics.

        Returns:
            ``EvalLoopOutput(predictions, label_ids, metrics, num_samples)``; see ``predict``.

        Raises:
            DataError: no sample, or predictions that cannot be joined.
        """
        loss_only = prediction_loss_only
        if loss_only is None:
            loss_only = self.args.prediction_loss_only
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._watching_ranks(description.lower()))
            stack.enter_context(KeyValueCache(self.model, used=self.args.use_cache).as_asked())
            stack.enter_context(self._targets_of_evaluation())
            model = stack.enter_context(self._model_for_evaluation(generates=not loss_only))
            model.eval()
            self._num_watched = 0
            set_epoch(dataloader, 0, trains=False)
            collector, batch_metric = None, None if loss_only else self._batch_metric()
            if not loss_only:
                transport = Transport()
                stack.callback(transport.close)
                collector = self._collector(transport, batch_metric, description)
            totals = evaluate_batches(
                self._eval_batches(dataloader),
                lambda inputs: self._predict_batch(model, inputs, loss_only, ignore_keys),
                lambda batch: self.targets.counts(batch.inputs, batch.num_samples),
                device=device_name(),
                is_sum=lambda: self.targets.rule.is_sum,
                # What is not settled by then will not be: no more batches than that are held.
                can_count=self._can_count,
                finish=self._reduced,
                keep=collector,
                collective=self.resolved.stage == 3,
                on_step=lambda: self.events("on_prediction_step", eval_dataloader=dataloader),
                meet=lambda: self._meet(collector),
                meet_last=self._settle_rivals,
            )
            if totals.num_samples == 0:
                raise DataError(
                    Problem("the evaluation data gave no sample", "at least one is needed")
                )
            if totals.has_loss and totals.loss is None and self.ranks.is_main:
                logger.warning(
                    "no %s_loss: the %d samples have no target; the loss is %s",
                    metric_key_prefix,
                    totals.num_samples,
                    self.targets.rule,
                )
            collected = Collected() if collector is None else collector.finish()
            metrics: dict[str, Any] = {}
            if batch_metric is not None:
                metrics = batch_metric.values(transport)
            elif self.compute_metrics is not None and not loss_only:
                metrics = metric_values(self.compute_metrics, collected, transport)
        metrics = with_prefix(metrics, metric_key_prefix)
        if totals.loss is not None:
            metrics[f"{metric_key_prefix}_loss"] = totals.loss
        return compat.EvalLoopOutput(
            collected.predictions, collected.labels, metrics, totals.num_samples
        )

    def prediction_step(
        self,
        model: Any,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Return loss, predictions and labels of one batch, each None where there is none.

        Called on every rank as often as on every other; at the end of the data a rank may get a
        stand-in whose results are dropped.

        Args:
            model: what runs the forward pass.
            inputs: the batch, as the collator made it.
            prediction_loss_only: return the loss alone.
            ignore_keys: outputs that are no predictions; None takes those that the model's config
                names.
        """
        given = inputs if isinstance(inputs, Mapping) else {}
        names = self.label_names
        if forward_columns(self.model) is None:  # it may take labels, or none
            names = [name for name in names if name in given]
        has_labels = bool(names) and all(given.get(name) is not None for name in names)
        told = self.targets.target_count(inputs)
        # Not in the model's format: labels in 16 bits would be others than those of the data.
        labels = [to_device(given[n], device_name(), float_dtype=None) for n in names * has_labels]
        inputs = self._prepare_inputs(inputs)
        with (
            torch.no_grad(),
            self._computing_loss(inputs),
            self.compute_loss_context_manager(),
        ):
            if has_labels or (not names and self._computes_loss(given)):
                loss, outputs = self.compute_loss(
                    model, inputs, return_outputs=True, num_items_in_batch=told
                )
                parts, loss = self._parts_of(loss), loss.detach()
                loss = loss.mean() if loss.dim() else loss  # as it is: watched for what it is
                self._summed = (loss, parts)  # for whoever is given this loss
            else:
                outputs = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
                loss = loss_of(outputs, only_scalar=True)
        if prediction_loss_only:
            return loss, None, None
        logits = logits_of(
            outputs,
            self._ignored_keys() if ignore_keys is None else ignore_keys,
            has_loss=loss is not None,
        )
        return loss, logits, (labels[0] if len(labels) == 1 else tuple(labels) or None)

    # --- behind the edge ------------------------------------------------------------------------

    def evaluate_in_training(self) -> Any:
        """Evaluate because a callback asked for it; random states of training stay as they were.

        Returns:
            the control object.

        Raises:
            EvaluationStopped: a signal ended it; log and callbacks are as if it had not begun.
        """
        assert self._preemption is not None
        state, undo = random_state(), self._undo_of_evaluation()
        try:
            with (
                self.events.reports_held(),
                self._preemption.evaluating(),
                self._engines.training.buffers.undisturbed(),
            ):
                metrics = self.evaluate(ignore_keys=self.ignore_keys_for_eval)
        except EvaluationStopped:
            undo()
            raise
        finally:
            set_random_state(state)
        self._follow_metric(metrics)
        self._report_trial(metrics)
        # An evaluation before the first step has no checkpoint that it could be of.
        if self.state.global_step and self.best.judge(metrics):
            self.control.should_save |= self.args.save_strategy == "best"
        return self.control

    def _undo_of_evaluation(self) -> Callable[[], None]:
        """Return a function that undoes an evaluation's log entries and effects on callbacks.

        It is about what a checkpoint holds: a run that goes on from there evaluates all sets.
        (Trackers have not heard of them yet.)
        """
        num_entries = len(self.state.log_history)
        give_back = self.events.take_down()

        def undo() -> None:
            del self.state.log_history[num_entries:]
            give_back()

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

    def _watching_ranks(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Name the ranks that do not come in a block, in which ``what`` is done."""
        step, timeout = self.state.global_step, self.args.ddp_timeout
        return self._watches.over(what, step=step, timeout_seconds=timeout)

    def _watching(self, inputs: Any) -> contextlib.AbstractContextManager[list[Any]]:
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
        """Agree on what a target is, where later batches may have told; a collective."""
        if self.targets.has_rivals:
            self.targets.agree(self.ranks, final=False)

    def _can_count(self) -> bool:
        """Return whether the batches so far can be counted; others are held until ranks agree."""
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

    def _with_speed(self, output: Any, started: float, prefix: str) -> dict[str, float]:
        batch = eval_micro_batch(self.args, self.ranks.world_size) * self.ranks.world_size
        metrics = dict(output.metrics) | compat.speed_metrics(
            prefix,
            started,
            num_samples=output.num_samples,
            num_steps=math.ceil(output.num_samples / batch),
        )
        return metrics | self.derived_metrics(metrics, prefix)

    @contextlib.contextmanager
    def _model_for_evaluation(self, *, generates: bool) -> Iterator[Any]:
        """Give the block the model that runs the forward passes of one evaluation."""
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

    @property
    def _format(self) -> str:
        """Return the number format of what goes into the model."""
        return self._eval_format or self._engines.precision(self.model, self.resolved)

    def _batch_metric(self) -> BatchMetric | None:
        wanted = self.args.batch_eval_metrics and self.compute_metrics is not None
        return BatchMetric(self.compute_metrics) if wanted else None

    def _collector(
        self, transport: Transport, batch_metric: BatchMetric | None, description: str
    ) -> Collector:
        keeping = PredictionOptions(
            folder=Path(self.args.output_dir),
            keep=batch_metric is None or description == _PREDICTION,
            concat=self.args.eval_do_concat_batches,
            every=self.args.eval_accumulation_steps or 1,
            losses="loss" in self.args.include_for_metrics,
            objects=bool(self.args.eval_use_gather_object),
            memory_bytes=self.args.eval_memory_mb * _MEGABYTE,
        )
        return Collector(
            transport, keeping, on_batch=None if batch_metric is None else batch_metric.add
        )

    def _predict_batch(
        self, model: Any, inputs: Any, loss_only: bool, ignore_keys: list[str] | None
    ) -> Prediction:
        """Call ``prediction_step``, and add the inputs where metrics want them."""
        main = getattr(self.model, "main_input_name", "input_ids")
        wants_inputs = not loss_only and "inputs" in self.args.include_for_metrics
        kept = inputs.get(main) if wants_inputs and isinstance(inputs, Mapping) else None
        with self._watching(inputs) as seen:
            loss, logits, labels = self.prediction_step(
                model, inputs, loss_only, ignore_keys=ignore_keys
            )
            seen.append(loss)
        if loss is not None:
            loss = self._parts_of(torch.as_tensor(loss))
        return Prediction(loss) if loss_only else Prediction(loss, logits, labels, kept)

    def _reduced(self, prediction: Prediction) -> Prediction:
        """Apply ``preprocess_logits_for_metrics`` to the logits, where both are there."""
        reduce, logits = self.preprocess_logits_for_metrics, prediction.predictions
        if logits is None or reduce is None:
            return prediction
        return replace(prediction, predictions=reduce(logits, prediction.labels))

    def _eval_batches(self, loader: Any) -> Iterator[EvalBatch]:
        for micro_batch, is_last in synchronized_batches(loader, device=device_name()):
            yield EvalBatch(micro_batch.inputs, micro_batch.num_samples, is_last)

    def _computes_loss(self, inputs: Mapping[str, Any]) -> bool:
        """Tell whether there is a loss although the batch has no labels."""
        from dstrain.trainer.trainer import Trainer

        own = getattr(self, "compute_loss_func", None) is not None
        if own or type(self).compute_loss is not Trainer.compute_loss:
            return True
        wanted = inputs.get("return_loss")
        return returns_loss(self.model) if wanted is None else bool(wanted)

    def _ignored_keys(self) -> Sequence[str]:
        """Return the names of outputs that, by the model's config, are no predictions."""
        config = getattr(self.model, "config", None)
        if config is None:
            return ()
        return getattr(config, "keys_to_ignore_at_inference", ("past_key_values",))
