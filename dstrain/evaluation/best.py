"""Choice of the best evaluation, and so of the best checkpoint, by a metric."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.core.errors import ConfigError, Problem


@dataclass(frozen=True)
class BestRule:
    """Rule for comparing two evaluations.

    Attributes:
        metric: name of the metric, with or without "eval_" before it.
        greater_is_better: whether the larger of two values is better.
    """

    metric: str
    greater_is_better: bool

    @property
    def key(self) -> str:
        """Return the metric's name with "eval_" before it, as evaluations report it."""
        return self.metric if self.metric.startswith("eval_") else f"eval_{self.metric}"

    def missing(self, known: Iterable[str]) -> ConfigError:
        """Return the error for an evaluation that lacks the metric; ``known`` are its metrics."""
        return ConfigError(
            Problem(
                f"metric_for_best_model={self.metric!r}: the evaluation has no {self.key!r}",
                f"it has {', '.join(sorted(known)) or 'no metric at all'}",
                "name one of these, or return it from compute_metrics; of a dict of evaluation "
                "sets, name the set too: eval_NAME_loss",
            )
        )

    def number(self, value: Any) -> float:
        """Return the value of the metric as a number.

        Raises:
            ConfigError: the value is not a number.
        """
        if isinstance(value, (int, float)):
            return float(value)
        raise ConfigError(
            Problem(
                f"metric_for_best_model={self.metric!r}: the evaluation gave {value!r}",
                "models are compared by a number",
                "name a metric that is one",
            )
        )

    def is_better(self, value: float, than: float | None) -> bool:
        """Tell whether ``value`` is better than ``than``; false for NaN and for equal values.

        Any number is better than None.
        """
        if math.isnan(value) or than is None:
            return not math.isnan(value)
        return value > than if self.greater_is_better else value < than

    def best_of(self, values: Mapping[int, float]) -> int | None:
        """Return the first step with the best value; None if all values are NaN or there are none.

        Args:
            values: step -> value of the metric.
        """
        best: int | None = None
        for step in sorted(values):
            if self.is_better(values[step], None if best is None else values[best]):
                best = step
        return best
