"""Evaluation loop: each sample is used once, and each target has the same weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dstrain.core.log import get_logger
from dstrain.core.ranks import raise_together, sum_over_ranks

logger = get_logger(__name__)


@dataclass(frozen=True)
class EvalBatch:
    """Batch of an evaluation on this rank.

    Attributes:
        inputs: inputs of the forward pass.
        num_samples: number of samples; 0 for a padding batch.
        is_last: whether it is the last batch on all ranks.
    """

    inputs: Any
    num_samples: int
    is_last: bool = False


@dataclass(frozen=True)
class Prediction:
    """Results of a forward pass, on any device and nested in any way.

    Attributes:
        loss: mean loss over the targets of the batch, with one element, or one for each part of the
            loss; or None.
        predictions: the model's outputs.
        labels: the batch's labels.
        inputs: the batch's main input, if metrics need it.
    """

    loss: torch.Tensor | float | None
    predictions: Any = None
    labels: Any = None
    inputs: Any = None


@dataclass(frozen=True)
class LossTotals:
    """Sums over the whole evaluation set, equal on all ranks.

    Attributes:
        loss: mean loss per target; None when a batch had no loss, or no batch had a target.
        num_targets: targets over all ranks, of all parts of the loss.
        has_loss: whether every batch had a loss.
        num_samples: samples over all ranks.
        num_steps: forward passes of this rank.
    """

    loss: float | None
    num_targets: int
    num_samples: int
    num_steps: int
    has_loss: bool


class PredictionReceiver(Protocol):
    """Receiver of predictions, such as ``Collector``."""

    def add(self, batch: EvalBatch, prediction: Prediction | None) -> None:
        """Add a batch's results; some of the calls are collectives of all ranks.

        Results added after ``fail`` are not kept.
        """
        ...

    def fail(self, error: Exception) -> None:
        """Store this rank's error, to raise it on all ranks at the next collective or the end."""
        ...

    def abort(self, error: Exception) -> None:
        """Raise the error of a failed forward pass on all ranks, instead of adding its batch."""
        ...


@torch.no_grad()
def evaluate_batches(
    batches: Iterable[EvalBatch],
    predict: Callable[[Any], Prediction],
    count: Callable[[EvalBatch], tuple[int, ...]],
    *,
    device: Any,
    is_sum: Callable[[], bool] = lambda: False,
    can_count: Callable[[], bool] = lambda: True,
    finish: Callable[[Prediction], Prediction] = lambda prediction: prediction,
    keep: PredictionReceiver | None = None,
    collective: bool = False,
    on_step: Callable[[], None] = lambda: None,
    meet: Callable[[], None] = lambda: None,
    meet_last: Callable[[], None] = lambda: None,
) -> LossTotals:
    """Return the mean loss over all targets of all ranks; pass predictions to ``keep``.

    A mean of batch means would depend on the split of samples into batches; the sum of (batch mean
    x its targets) divided by the sum of targets does not. All ranks must pass the same number of
    batches, as forward passes may be collective (ZeRO-3); ranks without a sample pass padding
    batches, which have weight 0.

    An error on one rank is raised on all ranks when predictions are next sent. Until then this rank
    goes on without keeping results, and without forward passes unless these are collective. Without
    ``keep`` nothing is sent before the end, so the error is raised at once, on its rank alone.

    Args:
        batches: this rank's batches.
        predict: makes a forward pass.
        count: returns the number of targets of a batch for each part of its loss; called after
            ``meet``, as the definition of a target may follow from the first forward pass.
        device: device on which losses are summed.
        is_sum: tells, at the end, whether losses are sums and not means.
        can_count: tells whether ``count`` is final; until then batches are stored, and counted at
            the end at the latest.
        finish: changes a prediction before it is kept; not a collective.
        keep: receives each batch, padding batches included, with its results.
        collective: whether ``predict`` is a collective. An error in it is raised at once, on its
            rank alone, as other ranks may wait in their forward passes.
        on_step: called after each batch.
        meet: called after ``on_step`` on every rank, even after a failure; may be a collective.
        meet_last: called like ``meet``, once after the last batch and before stored batches are
            counted.
    """
    sums = _PartSums(device)
    num_samples = num_steps = without_loss = 0
    failure: Exception | None = None
    uncounted: list[tuple[Any, EvalBatch]] = []
    for batch in batches:
        prediction: Prediction | None = None
        if failure is None or collective:
            try:
                prediction = predict(batch.inputs)
            except Exception as error:
                if keep is not None and not collective:
                    keep.abort(error)
                raise
        if failure is None and prediction is not None:
            try:
                prediction = finish(prediction)
            except Exception as error:
                failure = _logged_and_stored(error, keep)
        if failure is not None or prediction is None:
            prediction = loss = None
        else:
            loss = prediction.loss
            without_loss += bool(batch.num_samples) and loss is None
        num_samples += batch.num_samples
        num_steps += 1
        if keep is not None:
            keep.add(batch, prediction)
        del prediction  # frees its tensors before the next forward pass
        if failure is None:
            try:
                on_step()
            except Exception as error:
                failure = _logged_and_stored(error, keep)
        meet()
        if batch.num_samples and loss is not None:
            uncounted.append((loss, batch))
        if can_count():
            sums.add_all(uncounted, count)
    meet_last()
    sums.add_all(uncounted, count)
    failed = failure is not None  # and was not raised when predictions were sent
    counts = torch.tensor([num_samples, without_loss, failed], dtype=torch.float64, device=device)
    samples, missing, num_failed, *parts = sum_over_ranks(torch.cat([counts, sums.all()])).tolist()
    if num_failed:
        raise_together(failure)
    losses, targets = parts[:_MOST_PARTS], parts[_MOST_PARTS:]
    mean: float | None = None
    if any(targets) and not missing:
        pairs = zip(losses, targets, strict=True)
        mean = sum(loss / (1 if is_sum() else number) for loss, number in pairs if number)
    return LossTotals(mean, int(sum(targets)), int(samples), num_steps, not missing)


_MOST_PARTS = 2
"""Most parts of a loss; all ranks sum this many numbers, also a rank that has seen no loss."""


class _PartSums:
    """Sums of loss x targets, and of targets, for each part of the loss."""

    def __init__(self, device: Any) -> None:
        self._losses = torch.zeros(_MOST_PARTS, dtype=torch.float64, device=device)
        self._targets = [0] * _MOST_PARTS

    def add_all(
        self,
        losses: list[tuple[Any, EvalBatch]],
        count: Callable[[EvalBatch], tuple[int, ...]],
    ) -> None:
        """Add the losses of batches, and empty the list."""
        for loss, batch in losses:
            self.add(loss, count(batch))
        losses.clear()

    def add(self, loss: Any, counts: tuple[int, ...]) -> None:
        """Add a batch's loss without waiting for the device."""
        parts = torch.as_tensor(loss, dtype=torch.float64, device=self._losses.device).detach()
        if len(counts) == 1:
            parts = parts.mean().reshape(1)
        for index, (part, number) in enumerate(zip(parts, counts, strict=True)):
            if number:  # a mean over no target is NaN, also with weight 0
                self._losses[index] += part * number
                self._targets[index] += number

    def all(self) -> torch.Tensor:
        """Return the sums of losses, then those of targets: (2 x parts,)."""
        targets = torch.tensor(self._targets, dtype=torch.float64, device=self._losses.device)
        return torch.cat([self._losses, targets])


def _logged_and_stored(error: Exception, keep: PredictionReceiver | None) -> Exception:
    """Log an error and store it in ``keep``, as it is raised only some batches later; return it.

    Raises:
        Exception: the error itself, if ``keep`` is None.
    """
    if keep is None:
        raise error
    logger.error("the evaluation will end with %s: %s", type(error).__name__, error)
    keep.fail(error)
    return error
