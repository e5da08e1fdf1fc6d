"""Methods of a ``Trainer`` that evaluate and predict, for users and subclasses."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from dstrain.config.resolution.batch import eval_micro_batch
from dstrain.core.errors import DataError, Problem
from dstrain.core.log import get_logger
from dstrain.data import forward_columns, set_epoch, to_device
from dstrain.engine import device_name
from dstrain.evaluation import (
    Collected,
    Prediction,
    Transport,
    evaluate_batches,
    metric_values,
    with_prefix,
)
from dstrain.trainer import compat
from dstrain.trainer.evaluation_parts import PREDICTION, EvaluationParts
from dstrain.training.key_value_cache import KeyValueCache
from dstrain.training.model_outputs import logits_of, loss_of
from dstrain.training.types import Batch, Dataset, Loader, Nested
from dstrain.training.watches import watched

if TYPE_CHECKING:
    from dstrain.trainer.compat import EvalLoopOutput, PredictionOutput

logger = get_logger(__name__)

_EVALUATION = "Evaluation"


class EvaluationHooks(EvaluationParts):
    """Has the methods of transformers' Trainer about evaluation and prediction.

    Every sample is predicted once, at any number of ranks. Predictions go to rank 0 alone, which
    computes metrics and tells the others; what is large there is in files.
    """

    # --- what a user calls ----------------------------------------------------------------------

    @watched(_EVALUATION.lower())
    def evaluate(
        self,
        eval_dataset: Dataset = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Compute loss and metrics over a dataset, each sample once; log them, on all ranks.

        Works before, during and after training at every ZeRO stage. The loss is the mean over all
        targets, so it depends neither on the batch size nor on the number of ranks.
        ``compute_metrics`` runs on rank 0 alone.

        Args:
            eval_dataset: a dataset instead of the constructor's, or the name of one of those; each
                set of a dict is evaluated, with its name in the prefix.
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
        self.event("on_evaluate", metrics=metrics)
        metrics |= self._memory.stop("eval")
        return metrics

    @watched(PREDICTION.lower())
    def predict(
        self,
        test_dataset: Dataset,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
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
                description=PREDICTION,
                ignore_keys=ignore_keys,
                metric_key_prefix=metric_key_prefix,
            )
        metrics = self._with_speed(output, started, metric_key_prefix)
        self.event("on_predict", metrics=metrics)
        metrics |= self._memory.stop("test")
        return compat.PredictionOutput(output.predictions, output.label_ids, metrics)

    # --- what a subclass overrides --------------------------------------------------------------

    def derived_metrics(self, metrics: dict[str, float], prefix: str) -> dict[str, float]:
        """Compute metrics from others after an evaluation; none by default."""
        return {}

    def prediction_loop(
        self,
        dataloader: Loader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run ``evaluation_loop`` under its older name; ``evaluate`` and ``predict`` call this."""
        return self.evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )

    def evaluation_loop(
        self,
        dataloader: Loader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run a loader through ``prediction_step``; with and without labels.

        Args:
            dataloader: this rank's loader.
            description: "Evaluation" or "Prediction"; the latter always keeps predictions.
            prediction_loss_only: keep no predictions; None takes the argument of that name.
            ignore_keys: outputs of the model that are no predictions.
            metric_key_prefix: prefix of the names of metrics.

        Returns:
            ``EvalLoopOutput(predictions, label_ids, metrics, num_samples)``; see ``predict``.

        Raises:
            DataError: no sample, or predictions that cannot be joined.
        """
        loss_only = prediction_loss_only
        if loss_only is None:
            loss_only = self.args.prediction_loss_only

        def on_step() -> None:
            self.event("on_prediction_step", eval_dataloader=dataloader)

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
                on_step=on_step,
                meet=lambda: self._meet(collector),
                meet_last=self._settle_rivals,
            )
            self._watches.enter("the end of an evaluation")
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
        model: torch.nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Nested, Nested]:
        """Return loss, predictions and labels of one batch, each None where there is none.

        Called equally often on all ranks; at the end of the data a rank may get a padding batch,
        whose results are dropped.

        Args:
            model: the engine or module that runs the forward pass.
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

    # --- behind the edge --------------------------------------------------------------------------

    def _with_speed(self, output: EvalLoopOutput, started: float, prefix: str) -> dict[str, float]:
        batch = eval_micro_batch(self.args, self.ranks.world_size) * self.ranks.world_size
        num_samples = output.num_samples or 0
        metrics = dict(output.metrics or {}) | compat.speed_metrics(
            prefix,
            started,
            num_samples=num_samples,
            num_steps=math.ceil(num_samples / batch),
        )
        return metrics | self.derived_metrics(metrics, prefix)

    def _predict_batch(
        self, model: torch.nn.Module, inputs: Batch, loss_only: bool, ignore_keys: list[str] | None
    ) -> Prediction:
        """Call ``prediction_step``, and keep the inputs where metrics need them."""
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
