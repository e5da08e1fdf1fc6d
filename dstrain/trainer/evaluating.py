"""Evaluation on a ``Trainer``: what a user calls, and what a subclass overrides."""

from __future__ import annotations

import time
from typing import Any

from dstrain.core.errors import DataError, Problem
from dstrain.data import batch_size, iterate, set_epoch
from dstrain.engine import device_name
from dstrain.evaluation import EvalBatch, evaluate_loss
from dstrain.trainer import build, compat


class EvaluationHooks:
    """The methods of transformers' Trainer about evaluation."""

    model: Any
    eval_dataset: Any
    resolved: Any
    ranks: Any
    targets: Any
    events: Any
    _engines: Any
    compute_loss: Any
    log: Any
    _loader: Any
    _prepare_inputs: Any

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss over a dataset, each sample once; logged and returned.

        Works before, during and after training at every ZeRO stage. The loss is the mean over all
        targets, so it depends neither on the batch size nor on the number of ranks.

        Args:
            eval_dataset: instead of the one given to the constructor; of a dict each set is
                evaluated, with its name in the prefix.
            ignore_keys: for drop-in use; no outputs are gathered here.
            metric_key_prefix: "eval" gives ``eval_loss`` and so on.

        Raises:
            DataError: no evaluation data, or an empty one.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            results: dict[str, float] = {}
            for name, part in dataset.items():
                prefix = f"{metric_key_prefix}_{name}"
                results |= self.evaluate(part, ignore_keys, prefix)
            return results
        loader = self.get_eval_dataloader(eval_dataset)
        build.check_shared_out(loader, self.ranks, method="get_eval_dataloader")
        started = time.time()
        metrics = self.evaluation_loop(loader, metric_key_prefix=metric_key_prefix)
        num_samples, num_steps = metrics.pop("_samples"), metrics.pop("_steps")
        metrics |= compat.speed_metrics(
            metric_key_prefix, started, num_samples=num_samples, num_steps=num_steps
        )
        metrics |= self.derived_metrics(metrics, metric_key_prefix)
        self.log(metrics)
        self.events("on_evaluate", metrics=metrics)
        return metrics

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """This rank's evaluation loader.

        Raises:
            DataError: there is no evaluation data, or it is empty.
        """
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise DataError(
                Problem("evaluate() without eval_dataset", "", "pass one here or to the Trainer")
            )
        return self._loader(dataset, train=False)

    def derived_metrics(self, metrics: dict[str, float], prefix: str) -> dict[str, float]:
        """Metrics computed from others after an evaluation; none by default."""
        return {}

    def evaluation_loop(self, loader: Any, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Run an evaluation loader; the loss, and the counts under ``_samples`` and ``_steps``."""
        model = self._engines.forward_model(self.model, self.resolved)
        model.eval()
        set_epoch(loader, 0)
        totals = evaluate_loss(
            self._eval_batches(loader),
            lambda inputs: self.compute_loss(model, inputs),
            device=device_name(),
            on_step=lambda: self.events("on_prediction_step", eval_dataloader=loader),
        )
        if totals.num_samples == 0:
            raise DataError(Problem("the evaluation data gave no sample", "at least one is needed"))
        metrics: dict[str, float] = {"_samples": totals.num_samples, "_steps": totals.num_steps}
        if totals.loss is not None:
            metrics[f"{metric_key_prefix}_loss"] = totals.loss
        return metrics

    def evaluate_in_training(self) -> None:
        """Evaluate because a callback asked for it."""
        self.evaluate()

    def _eval_batches(self, loader: Any) -> Any:
        for micro_batch, _ in iterate(loader):
            inputs = micro_batch.inputs
            targets = 0 if micro_batch.masked else self.targets.count(inputs)
            samples = 0 if micro_batch.masked else batch_size(inputs)
            if targets == 0:
                inputs = self.targets.without_ignored(inputs)
            yield EvalBatch(self._prepare_inputs(inputs), targets, samples)
