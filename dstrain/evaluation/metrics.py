"""Computation of a user's metrics on rank 0, with the results sent to all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import EvalPrediction

from dstrain.core.errors import DataError, Problem
from dstrain.core.log import get_logger
from dstrain.core.records import plain_numbers
from dstrain.evaluation.collect import Collected
from dstrain.evaluation.pages import releasing_pages
from dstrain.evaluation.transport import Transport

logger = get_logger(__name__)

ComputeMetrics = Callable[..., dict[str, Any]]


def metric_values(
    compute_metrics: ComputeMetrics, collected: Collected, transport: Transport
) -> dict[str, Any]:
    """Return the metrics of all predictions on all ranks; a collective.

    Only rank 0 calls ``compute_metrics``, which therefore must not make a collective of all ranks.

    Raises:
        DataError: ``compute_metrics`` did not return a dict with text keys; raised on all ranks.
        Exception: ``compute_metrics`` raised it; raised on all ranks.
    """

    def compute() -> dict[str, Any]:
        if not _is_complete(collected):
            return {}
        with releasing_pages(*vars(collected).values()):
            return _checked(compute_metrics(_eval_prediction(collected)))

    return transport.from_main(compute)


class BatchMetric:
    """Metric that is updated with each batch of all ranks, so that batches need not be kept."""

    def __init__(self, compute_metrics: ComputeMetrics) -> None:
        """Set up without a result.

        Args:
            compute_metrics: the user's function, which also takes ``compute_result``: True with
                the last batch.
        """
        self._compute_metrics = compute_metrics
        self._result: dict[str, Any] = {}

    def add(self, collected: Collected, is_last: bool) -> None:
        """Pass a batch to the metric, on rank 0."""
        if _is_complete(collected, warn=is_last):
            prediction = _eval_prediction(collected)
            result = self._compute_metrics(prediction, compute_result=is_last)
            if is_last:
                self._result = _checked(result)

    def values(self, transport: Transport) -> dict[str, Any]:
        """Return the metric's result for the last batch on all ranks; a collective."""
        return transport.from_main(lambda: self._result)


def with_prefix(metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return metrics with ``prefix_`` before each name that does not begin with it."""
    return {
        name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value
        for name, value in metrics.items()
    }


def _eval_prediction(collected: Collected) -> EvalPrediction:
    return EvalPrediction(
        predictions=collected.predictions,
        label_ids=collected.labels,
        inputs=collected.inputs,
        losses=collected.losses,
    )


def _is_complete(collected: Collected, *, warn: bool = True) -> bool:
    """Tell whether there are both predictions and labels, as metrics need."""
    missing = [n for n in ("predictions", "labels") if getattr(collected, n) is None]
    if missing and warn:
        logger.warning("compute_metrics is not called: there are no %s", " and no ".join(missing))
    return not missing


def _checked(result: Any) -> dict[str, Any]:
    if not isinstance(result, Mapping):
        raise DataError(
            Problem(
                f"compute_metrics returned {type(result).__name__}",
                "names and values are needed",
                "return a dict",
            )
        )
    unnamed = [name for name in result if not isinstance(name, str)]
    if unnamed:
        raise DataError(
            Problem(
                f"compute_metrics returned a figure by the name {unnamed[0]!r} "
                f"({type(unnamed[0]).__name__})",
                "logs and trackers show figures by names that are text",
                "name it with str",
            )
        )
    return dict(plain_numbers(result))
